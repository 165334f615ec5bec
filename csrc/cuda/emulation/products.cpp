// Products of a warp group: async.h. A thread's products wait in its queue until warpgroup_wait(), where the group's
// threads meet and one of them does the arithmetic of all.
#include <algorithm>

#include "async.h"

namespace simt {
namespace {

constexpr int K = 16;
typedef float Vector __attribute__((vector_size(32)));

/// Registers that products add to. They read as NaN while any is under way.
struct Sums {
  float* d;
  std::vector<float> value;
  int products;
};
struct Asked {
  Product product;
  float* d;
  uint32_t a[4];
  int group;                   // 0: not committed
  std::vector<uint16_t> seen;  // by the first lane: its warp's rows of A, and B, as they were
};
struct Thread {
  std::vector<Sums> sums;
  std::vector<Asked> asked;
  int groups = 0;
  bool fenced = false;
};
std::vector<Thread> threads;
bool met[MAX_WARPS / 4][2];  // whether the meeting's work is done

Thread& me() { return threads[thread_number()]; }

constexpr int MOST = 128;                                    // registers of a thread that products add to
const std::vector<unsigned char> UNDER_WAY(4 * MOST, 0xff);  // NaN
bool under_way(const float* d, size_t n) { return std::memcmp(d, UNDER_WAY.data(), 4 * n) == 0; }

/// Bytes of a panel's rows.
int width_of(uint64_t descriptor) {
  const int mode = static_cast<int>(descriptor >> 62);
  return mode == 1 ? 128 : mode == 2 ? 64 : 32;
}

/// An operand in shared memory: 9.7.15.5.1. f(address, which number of those along its 16, which of the others) of
/// every 16 bytes; along: the eight are of the sum, across: the eight are the others.
template <class F>
void each_chunk(uint64_t descriptor, bool across, int first, int count, F f) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const int width = width_of(descriptor);
  if (descriptor >> 62 == 0) fail("a product of an operand without a swizzle");
  if (descriptor >> 46 & 0xffff) fail("a descriptor with bits that nobody has set");
  if (start % (8 * width) >= static_cast<uint32_t>(width) || (across && start % (8 * width)))
    fail("an operand that does not start at a multiple of " + std::to_string(8 * width) + " bytes");
  const uint32_t mask = static_cast<uint32_t>(width - 16);
  const auto swizzled = [&](uint32_t at) { return at ^ (at >> 3 & mask); };
  if (across) {
    for (int k = 0; k < K; ++k)
      for (int n = first; n < first + count; n += 8)
        f(swizzled(start + n / (width / 2) * leading + k / 8 * stride + k % 8 * width + n % (width / 2) * 2), k, n);
  } else {
    for (int n = first; n < first + count; ++n)
      for (int k = 0; k < K; k += 8) f(swizzled(start + n / 8 * stride + n % 8 * width + 2 * k), k, n);
  }
}

/// For the trace: the rows of an operand, neighbours as one.
void note_rows(uint64_t descriptor, bool across, int first, int count) {
  const uint32_t width = static_cast<uint32_t>(width_of(descriptor));
  std::vector<uint32_t> rows;
  each_chunk(descriptor, across, first, count, [&](uint32_t at, int, int) { rows.push_back(at / width * width); });
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  for (size_t begin = 0, end = 1; begin < rows.size(); begin = end++) {
    while (end < rows.size() && rows[end] == rows[end - 1] + width) ++end;
    note("multiply", rows[begin], static_cast<int64_t>(end - begin) * width);
  }
}

/// Appends count x 16 numbers to `to`.
void gather(std::vector<uint16_t>& to, uint64_t descriptor, bool across, int first, int count, bool asked) {
  const size_t begin = to.size();
  to.resize(begin + static_cast<size_t>(count) * K);
  each_chunk(descriptor, across, first, count, [&](uint32_t address, int k, int n) {
    const char* from = shared_of(current->rank, address, 16, 16);
    if (asked) check_fenced(address, 16, "a product");
    uint16_t numbers[8];
    std::memcpy(numbers, from, 16);
    uint16_t* row = to.data() + begin + static_cast<size_t>(n - first) * K + k;
    for (int i = 0; i < 8; ++i) row[across ? i * K : i] = numbers[i];
  });
}
/// What the warp of a group reads of shared memory: 16 rows of A, or none, and B.
std::vector<uint16_t> operands(const Product& p, int warp, bool asked) {
  std::vector<uint16_t> all;
  if (!p.mixed) gather(all, p.a, p.a_across, 16 * warp, 16, asked);
  gather(all, p.b, p.b_across, 0, p.n, asked);
  return all;
}

float widened(uint16_t bits, bool half) {
  if (half) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  }
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

/// out[64][n] = a[64][K] b[n][K]^T.
__attribute__((no_sanitize("address", "undefined"))) void arithmetic(const float (&a)[64][K], const uint16_t* b, int n,
                                                                     bool half, Vector (&out)[64][2 * MOST / 8]) {
  for (int block = 0; block < n / 8; ++block) {
    Vector columns[K];
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < 8; ++c) columns[k][c] = widened(b[(8 * block + c) * K + k], half);
    for (int r = 0; r < 64; ++r) {
      Vector sum{};
      for (int k = 0; k < K; ++k) sum += a[r][k] * columns[k];
      out[r][block] = sum;
    }
  }
}

Sums& sums_of(Thread& t, const float* d) {
  return *std::find_if(t.sums.begin(), t.sums.end(), [&](const Sums& s) { return s.d == d; });
}

/// Product `which` of the queues of a group's threads.
__attribute__((no_sanitize("address", "undefined"))) void carry_out(Thread* group, size_t which) {
  const Product p = group[0].asked[which].product;
  const int own = p.mixed ? 0 : 16 * K;  // numbers of A that a warp saw in front of B
  static float a[64][K];
  static Vector out[64][2 * MOST / 8];
  for (int warp = 0; warp < 4; ++warp) {
    const std::vector<uint16_t>& seen = group[32 * warp].asked[which].seen;
    if (operands(p, warp, false) != seen) fail("shared memory changed while a product read it");
    for (int i = 0; i < own; ++i) a[16 * warp + i / K][i % K] = widened(seen[static_cast<size_t>(i)], p.half);
    for (int l = 0; l < 32 && p.mixed; ++l)
      for (int j = 0; j < 4; ++j)
        for (int h = 0; h < 2; ++h)
          a[16 * warp + l / 4 + 8 * (j % 2)][2 * (l % 4) + 8 * (j / 2) + h] =
              widened(static_cast<uint16_t>(group[32 * warp + l].asked[which].a[j] >> 16 * h), p.half);
  }
  arithmetic(a, group[0].asked[which].seen.data() + own, p.n, p.half, out);
  for (int t = 0; t < 128; ++t) {
    Sums& sums = sums_of(group[t], group[t].asked[which].d);
    float* value = sums.value.data();
    const int row = t / 32 * 16 + t % 32 / 4;
    for (int i = 0; i < p.n / 2; ++i) {
      const float product = out[row + 8 * (i / 2 % 2)][i / 4][2 * (t % 4) + i % 2];
      value[i] = p.add ? value[i] + product : product;
    }
    --sums.products;
  }
}

/// All groups of products but the last `pending`, of the warp group's 128 threads.
void finish(Thread* group, int pending) {
  const auto covered = [&](const Thread& t) {
    return std::count_if(t.asked.begin(), t.asked.end(),
                         [&](const Asked& q) { return q.group != 0 && q.group <= t.groups - pending; });
  };
  const auto count = covered(group[0]);
  for (int i = 1; i < 128; ++i) {
    bool same = covered(group[i]) == count;
    for (int k = 0; same && k < count; ++k) same = group[i].asked[k].product == group[0].asked[k].product;
    if (!same) fail("the threads of a warp group have asked for different products");
  }
  for (int k = 0; k < count; ++k) carry_out(group, static_cast<size_t>(k));
  for (Thread* t = group; t < group + 128; ++t) {
    t->asked.erase(t->asked.begin(), t->asked.begin() + count);
    for (Sums& s : t->sums) {
      if (s.products > 0) continue;
      if (!under_way(s.d, s.value.size())) fail("registers were written while a product added to them");
      std::copy(s.value.begin(), s.value.end(), s.d);
    }
    const auto done = [](const Sums& s) { return s.products == 0; };
    t->sums.erase(std::remove_if(t->sums.begin(), t->sums.end(), done), t->sums.end());
  }
}

}  // namespace

void multiply(const Product& p, float* d, const uint32_t* a) {
  Thread& t = me();
  if (block_size.x % 128) fail("products of a warp group in a block that is not whole groups");
  if (!t.fenced) fail("a product without warpgroup_fence() since the last warpgroup_wait()");
  const size_t n = static_cast<size_t>(p.n) / 2;
  auto sums = std::find_if(t.sums.begin(), t.sums.end(), [&](const Sums& s) { return s.d == d; });
  if (sums == t.sums.end()) {
    t.sums.push_back({d, std::vector<float>(d, d + n), 0});
    sums = t.sums.end() - 1;
    std::memcpy(d, UNDER_WAY.data(), 4 * n);
  }
  if (sums->value.size() != n) fail("products of different widths add to the same registers");
  if (!under_way(d, n)) fail("registers were written while a product added to them");
  ++sums->products;
  Asked asked{p, d, {}, 0, {}};
  if (a) std::copy(a, a + 4, asked.a);
  if (current->lane == 0) {
    const int warp = static_cast<int>(current->warp % 4);
    asked.seen = operands(p, warp, true);
    if (tracing && !p.mixed) note_rows(p.a, p.a_across, 16 * warp, 16);
    if (tracing) note_rows(p.b, p.b_across, 0, p.n);
  }
  t.asked.push_back(std::move(asked));
}
void warpgroup_fence() {
  note("warpgroup_fence");
  me().fenced = true;
}
void warpgroup_commit() {
  note("warpgroup_commit");
  ++me().groups;
  for (Asked& q : me().asked)
    if (q.group == 0) q.group = me().groups;
}
void warpgroup_wait(int pending) {
  note("warpgroup_wait", pending);
  me().fenced = false;
  const unsigned group = current->warp / 4;
  bool& done = met[group][current->group_parity];
  current->group_parity ^= 1;
  done = false;
  wait(State::at_group, 100 + pending);
  if (done) return;
  done = true;
  finish(threads.data() + 128 * group, pending);
}

void begin_products(size_t count) { threads.assign(count, {}); }
void end_products() {
  if (!me().asked.empty()) fail("a thread ends before warpgroup_wait() of its products");
}

}  // namespace simt
