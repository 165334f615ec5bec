#include "cuda/rope.h"

#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

Kernel kernel("rope", "rope");

/// Heads of a thread: all even shares of at most ROPE_HEADS, fewer where the grid would be less than two full waves of
/// blocks, four to a multiprocessor.
int64_t share(int64_t Hq, int64_t Hk, int64_t blocks, int sms) {
  int64_t heads = max(Hq, Hk);
  heads = ceil_div(heads, ceil_div(heads, ROPE_HEADS));
  while (heads > 2 && blocks * (ceil_div(Hq, heads) + ceil_div(Hk, heads)) < 8 * sms) heads = ceil_div(heads, 2);
  return heads;
}

/// Whether the addresses x[b, s], whatever b and s there are, are multiples of 16 bytes.
bool even(const void* at, int64_t size, int64_t B, int64_t batch, int64_t S, int64_t position) {
  return aligned(at) && (B == 1 || batch * size % 16 == 0) && (S == 1 || position * size % 16 == 0);
}

const void* move(const void* at, int64_t bytes) { return static_cast<const char*>(at) + bytes; }

}  // namespace

void rope(DType dtype, const void* q, int64_t q_batch, int64_t q_head, int64_t q_position, void* q_out,
          bool q_by_position, int64_t Hq, const void* k, int64_t k_batch, int64_t k_head, int64_t k_position,
          void* k_out, bool k_by_position, int64_t Hk, DType table, const void* cos, const void* sin,
          int64_t table_batch, int64_t table_position, int64_t B, int64_t S, int64_t D, int64_t R, bool interleaved,
          bool inverse, int device, Stream stream) {
  if (B == 0 || S == 0 || D == 0 || Hq + Hk == 0) return;
  const int64_t size = size_of(dtype), half = R / 2;
  RopeArguments a{};
  const auto tensor = [&](const void* in, int64_t batch, int64_t head, int64_t position, void* out, bool by_position,
                          int64_t H) {
    const int64_t out_head = by_position ? D : S * D, out_position = by_position ? H * D : D;
    const int32_t heads = static_cast<int32_t>(H);
    return RopeTensor{in, out, batch, head, position, H * S * D, out_head, out_position, heads};
  };
  a.x[0] = tensor(q, q_batch, q_head, q_position, q_out, q_by_position, Hq);
  a.x[1] = tensor(k, k_batch, k_head, k_position, k_out, k_by_position, Hk);
  a.cos = cos;
  a.sin = sin;
  a.table_batch = table_batch;
  a.table_position = table_position;
  bool wide = half * size % 16 == 0 && D * size % 16 == 0;
  for (const RopeTensor& x : a.x) {
    if (x.heads == 0) continue;
    wide &= even(x.in, size, B, x.in_batch, S, x.in_position) && aligned(x.out);
    wide &= x.heads == 1 || x.in_head * size % 16 == 0;
  }
  const int64_t table_size = size_of(table);
  const bool even_tables = even(cos, table_size, B, table_batch, S, table_position) && aligned(sin);
  a.table = static_cast<int32_t>(table);
  if (even_tables && table == DType::float32) a.table = ROPE_WIDE_FLOAT32;
  if (even_tables && table == dtype && table != DType::float32) a.table = ROPE_WIDE_SAME;
  if (!wide) a.table = static_cast<int32_t>(table);

  const int64_t place = wide ? 16 / size : 1, turning = half / place, beside = ceil_div(ceil_div(D - R, place), 2);
  const int64_t units = turning + beside;
  a.sign = inverse ? -1.f : 1.f;
  a.units = Divider(units);
  a.turning = static_cast<uint32_t>(turning);
  a.step = static_cast<int32_t>(!wide && interleaved ? 2 : place);
  a.distance = static_cast<int32_t>(!wide && interleaved ? 1 : half);
  a.gap = static_cast<int32_t>(beside * place);
  a.R = static_cast<int32_t>(R);
  a.D = static_cast<int32_t>(D);

  const int64_t heads = share(Hq, Hk, ceil_div(B * S * units, ROPE_THREADS), cuda::device(device).sms);
  const int64_t q_groups = ceil_div(Hq, heads), groups = q_groups + ceil_div(Hk, heads);
  a.groups = Divider(groups);
  a.q_groups = static_cast<uint32_t>(q_groups);
  a.group_heads = static_cast<int32_t>(heads);

  // Threads of a group and blocks have 31 bits: above, some batches or, of one batch, some positions to a launch.
  const int64_t most = max(1, min(int64_t{1} << 30, (int64_t{1} << 38) / groups) / units);  // positions
  const int64_t batches = max(1, min(B, most / S)), positions = min(S, most);
  RopeArguments part = a;
  for (int64_t b = 0; b < B; b += batches) {
    for (int64_t s = 0; s < S; s += positions) {
      for (int i = 0; i < 2; ++i) {
        const RopeTensor& x = a.x[i];
        part.x[i].in = move(x.in, (b * x.in_batch + s * x.in_position) * size);
        part.x[i].out = const_cast<void*>(move(x.out, (b * x.out_batch + s * x.out_position) * size));
      }
      part.cos = move(cos, (b * table_batch + s * table_position) * table_size);
      part.sin = move(sin, (b * table_batch + s * table_position) * table_size);
      part.positions = Divider(min(positions, S - s));
      part.threads = static_cast<uint32_t>(min(batches, B - b) * min(positions, S - s) * units);
      const Grid grid{ceil_div(part.threads, ROPE_THREADS) * groups, ROPE_THREADS};
      kernel.launch(dtype,
                    !wide         ? ROPE_SINGLES
                    : interleaved ? ROPE_INTERLEAVED
                                  : ROPE_HALVES,
                    grid, part, device, stream);
    }
  }
}

}  // namespace fastlm::cuda
