// Barriers in shared memory and by number, the copy engine, the rule of its fence: async.h.
#include "async.h"

#include <algorithm>
#include <map>

namespace simt {
namespace {

constexpr uint64_t BARRIER_MARK = 0x7265697272616221;

struct Barrier {
  int count, missing;  // arrivals
  int64_t bytes;       // announced and not landed
  int phase;           // the parity of the one that goes on
  unsigned by;         // who made it
  bool seen;           // by all, since barrier_init_done()
  std::vector<Fiber*> waiting;
};
struct Named {
  int threads, arrived;
  std::vector<Fiber*> waiting;
};
struct Load {
  unsigned rank;
  uint32_t to;
  const Tensor* tensor;  // null: bytes that follow each other
  Corner corner;
  const char* from;
  unsigned bytes;
  uint32_t barrier;
};
struct Store {  // or an addition
  const Tensor* tensor;
  Corner corner;
  float* to;
  uint32_t from;
  unsigned bytes;
  int group;  // 0: not committed
  bool read;
  std::vector<char> seen;  // what stood there as it was asked for, then what is written
};
struct Thread {
  std::vector<Store> stores;
  int groups = 0;
  std::vector<uint32_t> unfenced;  // granules that it has written
  uint32_t waits_at = 0;           // what for, where its state is blocked
  int waits_for = 0;
};
struct Block {
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Named> named;
  std::vector<uint16_t> unfenced;  // of each granule of 16 bytes: how many writes wait for a fence
};
std::vector<Thread> threads;
std::vector<Block> blocks;
std::vector<Load> loads;
std::vector<Store> unwritten;  // read, and nobody waits for more
bool registers_set = false;

Block& block() { return blocks[current->rank]; }
Thread& me() { return threads[thread_number()]; }
std::string text(int64_t n) { return std::to_string(n); }

Barrier& barrier_at(unsigned rank, uint32_t address) {
  const auto found = blocks[rank].barriers.find(address);
  if (found == blocks[rank].barriers.end()) fail("a barrier that nobody has made, at " + text(address));
  uint64_t mark;
  std::memcpy(&mark, shared_of(rank, address, 8, 8), 8);
  if (mark != BARRIER_MARK) fail("something was written over the barrier at " + text(address));
  Barrier& b = found->second;
  if (!b.seen && (current == nullptr || b.by != thread_number())) fail("a barrier used before barrier_init_done()");
  return b;
}
void go_on(std::vector<Fiber*>& waiting) {
  for (Fiber* f : waiting) f->state = State::running;
  waiting.clear();
}
void advance(Barrier& b, uint32_t address) {
  if (b.missing < 0) fail("more arrivals than the barrier at " + text(address) + " counts: " + text(b.count));
  if (b.missing > 0 || b.bytes > 0) return;
  if (b.bytes < 0) fail(text(-b.bytes) + " bytes more than announced landed at the barrier at " + text(address));
  b.phase ^= 1;
  b.missing = b.count;
  go_on(b.waiting);
}
void block_at(uint32_t what, int detail) {
  me().waits_at = what;
  me().waits_for = detail;
  wait(State::blocked, 0);
}

/// f(address in shared memory, address in the tensor, how many numbers of it are there) of every 16 bytes of a box.
template <class F>
void each_chunk(const Tensor& t, uint32_t to, const Corner& corner, F f) {
  const int chunks = t.swizzle / 16;
  const uint32_t mask = t.swizzle == 128 ? 0x70 : 0x30;
  int64_t x[5];
  uint32_t row = to;
  for (int i4 = 0; i4 < t.box[4]; ++i4)
    for (int i3 = 0; i3 < t.box[3]; ++i3)
      for (int i2 = 0; i2 < t.box[2]; ++i2)
        for (int i1 = 0; i1 < t.box[1]; ++i1, row += t.swizzle) {
          const int step[5] = {0, i1, i2, i3, i4};
          bool inside = true;
          char* from = t.base;
          for (int k = 1; k < 5; ++k) {
            x[k] = int64_t{corner.at[k]} + step[k];
            inside &= x[k] >= 0 && x[k] < static_cast<int64_t>(t.sizes[k]);
            if (inside) from += x[k] * static_cast<int64_t>(t.strides[k - 1]);
          }
          for (int c = 0; c < chunks; ++c) {
            const uint32_t address = row + 16 * c;
            const int64_t first = int64_t{corner.at[0]} + 8 * c, left = static_cast<int64_t>(t.sizes[0]) - first;
            const int there = inside && first >= 0 ? static_cast<int>(std::clamp<int64_t>(left, 0, 8)) : 0;
            f(address ^ (address >> 3 & mask), from + 2 * first, there);
          }
        }
}
unsigned bytes_of(const Tensor& t) { return 2u * t.box[0] * t.box[1] * t.box[2] * t.box[3] * t.box[4]; }
void check_tile(const Tensor& t, uint32_t address) {
  if (address % (8u * t.swizzle)) fail("a tile that does not start at a multiple of " + text(8 * t.swizzle) + " bytes");
  shared_of(current->rank, address, bytes_of(t), 16);
}
void check_bulk(uint32_t address, const void* other, int bytes) {
  if (bytes <= 0 || bytes % 16 || address % 16 || reinterpret_cast<uintptr_t>(other) % 16)
    fail("a bulk copy whose addresses and bytes are not multiples of 16");
  shared_of(current->rank, address, static_cast<unsigned>(bytes), 16);
}

void expect_nothing_written(const char* at) {
  for (int i = 0; i < 16; ++i)
    if (at[i] != '\xff') fail("shared memory was written while a copy to it was under way");
}
void issue(Load load) {
  barrier_at(load.rank, load.barrier);
  std::memset(shared_of(load.rank, load.to, load.bytes, 16), 0xff, load.bytes);
  note("load", load.to, load.bytes, load.barrier);
  loads.push_back(load);
}
void issue(Store store) {
  check_fenced(store.from, store.bytes, store.tensor ? "a tile_store" : "a bulk_add");
  const char* from = shared_of(current->rank, store.from, store.bytes, 16);
  store.seen.assign(from, from + store.bytes);
  note("store", store.from, store.bytes);
  me().stores.push_back(std::move(store));
}
void read(Store& s) {
  if (std::memcmp(s.seen.data(), shared_of(current->rank, s.from, s.bytes, 16), s.bytes) != 0)
    fail("shared memory changed while a tile_store or bulk_add read it");
  s.read = true;
}
void write(const Store& s) {
  if (s.tensor) {
    each_chunk(*s.tensor, s.from, s.corner, [&](uint32_t address, char* to, int there) {
      if (there > 0) std::memcpy(to, s.seen.data() + (address - s.from), 16);
    });
    return;
  }
  for (unsigned i = 0; i < s.bytes / 4; ++i) {
    float part;
    std::memcpy(&part, s.seen.data() + 4 * i, 4);
    s.to[i] += part;
  }
}

}  // namespace

char* shared_of(unsigned rank, uint32_t address, unsigned bytes, unsigned alignment) {
  if (address % alignment) fail("an address in shared memory that is no multiple of " + text(alignment));
  if (address < SHARED_BASE || address - SHARED_BASE + size_t{bytes} > shared_bytes)
    fail("an address outside the block's shared memory");
  return shared_memory[rank] + (address - SHARED_BASE);
}

// --- barriers --------------------------------------------------------------------------------------------------------

void barrier_init(uint32_t address, int arrivals) {
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier that counts no arrivals or too many");
  watching = true;
  std::memcpy(shared_of(current->rank, address, 8, 8), &BARRIER_MARK, 8);
  Barrier& b = block().barriers[address];
  if (!b.waiting.empty()) fail("a barrier made anew while threads wait at it");
  b = {arrivals, arrivals, 0, 0, thread_number(), false, {}};
  note("init", address, arrivals);
}
void barrier_init_done() {
  for (auto& [address, b] : block().barriers)
    if (b.by == thread_number()) b.seen = true;
  note("init_done");
}
void barrier_arrive(uint32_t address) {
  note("arrive", address);
  Barrier& b = barrier_at(current->rank, address);
  --b.missing;
  advance(b, address);
}
void barrier_expect(uint32_t address, int bytes) {
  note("expect", address, bytes);
  if (bytes < 0 || bytes >= 1 << 20) fail("more bytes announced than a barrier can count");
  Barrier& b = barrier_at(current->rank, address);
  b.bytes += bytes;
  --b.missing;
  advance(b, address);
}
void barrier_wait(uint32_t address, int parity) {
  note("wait", address, parity);
  if (parity != 0 && parity != 1) fail("a parity that is neither 0 nor 1");
  Barrier& b = barrier_at(current->rank, address);
  if (b.phase != parity) return;
  b.waiting.push_back(current);
  block_at(address, parity);
  if (b.phase == parity) fail("the barrier at " + text(address) + " went on twice while a thread waited at it");
}
void named_barrier(int number, int count, bool waits) {
  note(waits ? "named_sync" : "named_arrive", number, count);
  if (number < 1 || number > 15) fail("a barrier's number must be 1 ... 15");
  if (count < 32 || count % 32 || count > static_cast<int>(block_size.x))
    fail("a barrier of " + text(count) + " threads");
  Named& n = block().named[number];
  if (n.arrived > 0 && n.threads != count)
    fail("barrier " + text(number) + " of " + text(n.threads) + " and of " + text(count) + " threads");
  n.threads = count;
  if (++n.arrived == count) {
    n.arrived = 0;
    go_on(n.waiting);
  } else if (waits) {
    n.waiting.push_back(current);
    block_at(static_cast<uint32_t>(number), -1);
  }
}

void set_registers(int count, bool up) {
  note("registers", count, up);
  if (count < 24 || count > 256 || count % 8) fail("registers must be 24, 32, ..., 256, got " + text(count));
  if (up ? count < current->registers : count > current->registers)
    fail("registers_" + std::string(up ? "up" : "down") + " from " + text(current->registers) + " to " + text(count));
  current->registers = count;
  registers_set = true;
}

// --- copies ----------------------------------------------------------------------------------------------------------

void touch(uint32_t address, unsigned bytes, Access access) {
  note(access == Access::read ? "read" : access == Access::write ? "write" : "copy", address, bytes);
  if (access == Access::read) return;
  const uint32_t first = (address - SHARED_BASE) / 16, last = (address - SHARED_BASE + bytes - 1) / 16;
  for (uint32_t g = first; g <= last; ++g) {
    ++block().unfenced[g];
    me().unfenced.push_back(g);
  }
}
void fence_async() {
  note("fence_async");
  for (uint32_t g : me().unfenced) --block().unfenced[g];
  me().unfenced.clear();
}
void check_fenced(uint32_t address, unsigned bytes, const char* reader) {
  shared_of(current->rank, address, bytes, 1);
  const uint32_t first = (address - SHARED_BASE) / 16, last = (address - SHARED_BASE + bytes - 1) / 16;
  for (uint32_t g = first; g <= last; ++g)
    if (block().unfenced[g])
      fail(std::string(reader) + ": shared memory read by the async proxy before fence_async() of who wrote it");
}

const Tensor& tensor_of(const void* map) {
  const Tensor& t = *static_cast<const Tensor*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 || t.magic != TENSOR_MAGIC) fail("no map of a tensor");
  return t;
}
void tile_load(uint32_t to, const void* map, uint32_t barrier, const Corner& corner) {
  const Tensor& t = tensor_of(map);
  check_tile(t, to);
  issue(Load{current->rank, to, &t, corner, nullptr, bytes_of(t), barrier});
}
void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  check_bulk(to, from, bytes);
  issue(Load{current->rank, to, nullptr, {}, static_cast<const char*>(from), static_cast<unsigned>(bytes), barrier});
}
void tile_store(const void* map, uint32_t from, const Corner& corner) {
  const Tensor& t = tensor_of(map);
  check_tile(t, from);
  issue(Store{&t, corner, nullptr, from, bytes_of(t), 0, false, {}});
}
void bulk_add(float* to, uint32_t from, int bytes) {
  check_bulk(from, to, bytes);
  issue(Store{nullptr, {}, to, from, static_cast<unsigned>(bytes), 0, false, {}});
}
void bulk_commit() {
  note("bulk_commit");
  ++me().groups;
  for (Store& s : me().stores)
    if (s.group == 0) s.group = me().groups;
}
void bulk_wait(int pending, bool written) {
  note(written ? "bulk_wait" : "bulk_wait_read", pending);
  Thread& t = me();
  const auto covered = [&](const Store& s) { return s.group != 0 && s.group <= t.groups - pending; };
  for (Store& s : t.stores) {
    if (!covered(s)) continue;
    if (!s.read) read(s);
    if (written) write(s);
  }
  if (written) t.stores.erase(std::remove_if(t.stores.begin(), t.stores.end(), covered), t.stores.end());
}
void check_written() {
  for (const Thread& t : threads)
    if (!t.stores.empty()) fail("a turn passed before bulk_wait() of what was added");
}

size_t copies_under_way() { return loads.size(); }

void land(size_t which) {
  const Load l = loads[which];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(which));
  if (l.tensor) {
    each_chunk(*l.tensor, l.to, l.corner, [&](uint32_t address, const char* from, int there) {
      char* to = shared_of(l.rank, address, 16, 16);
      expect_nothing_written(to);
      std::memset(to, 0, 16);
      if (there > 0) std::memcpy(to, from, 2 * static_cast<size_t>(there));
    });
  } else {
    char* to = shared_of(l.rank, l.to, l.bytes, 16);
    for (unsigned i = 0; i < l.bytes; i += 16) expect_nothing_written(to + i);
    std::memcpy(to, l.from, l.bytes);
  }
  Barrier& b = barrier_at(l.rank, l.barrier);
  b.bytes -= l.bytes;
  advance(b, l.barrier);
}

// --- the scheduler's -------------------------------------------------------------------------------------------------

void begin_cluster(unsigned count, unsigned threads_each) {
  threads.assign(count * threads_each, {});
  blocks.assign(count, {});
  for (Block& b : blocks) b.unfenced.assign(shared_bytes / 16 + 1, 0);
  loads.clear();
  unwritten.clear();
  registers_set = false;
  watching = tracing;
  begin_products(threads.size());
}

void end_thread() {
  for (Store& s : me().stores) {
    if (!s.read) fail("a thread ends before bulk_wait_read() of what it stores or adds");
    unwritten.push_back(std::move(s));
  }
  me().stores.clear();
  end_products();
}

void end_cluster(const std::vector<Fiber>& fibers) {
  if (!loads.empty()) fail("a block ends while copies to its shared memory are under way");
  for (const Store& s : unwritten) write(s);
  if (!registers_set) return;
  for (size_t first = 0; first < fibers.size(); first += block_size.x) {
    int64_t sum = 0;
    for (size_t i = first; i < first + block_size.x; ++i) {
      sum += fibers[i].registers;
      if (fibers[i].registers != fibers[first + (i - first) / 128 * 128].registers)
        fail("registers_up or registers_down of a part of a warp group");
    }
    if (sum > 65536) fail("registers_up to more registers than there are: " + text(sum));
  }
}

std::string who_waits(const std::vector<Fiber>& fibers) {
  const auto one = [&](size_t i) -> std::string {
    const Fiber& f = fibers[i];
    const Thread& t = threads[i];
    if (f.state == State::done) return "done";
    if (f.state == State::at_warp) return "in a collective of the warp";
    if (f.state == State::at_group) return "in warpgroup_wait()";
    if (f.state != State::blocked) return "at a barrier of all";
    if (t.waits_for < 0) {
      const Named& n = blocks[f.rank].named[static_cast<int>(t.waits_at)];
      return "at barrier " + text(t.waits_at) + " (" + text(n.arrived) + " of " + text(n.threads) + " there)";
    }
    const Barrier& b = blocks[f.rank].barriers[t.waits_at];
    return "at " + text(t.waits_at) + " for the end of a phase of parity " + text(t.waits_for) + " (" +
           text(b.missing) + " arrivals and " + text(b.bytes) + " bytes missing)";
  };
  std::string all;
  for (size_t i = 0; i < fibers.size();) {
    const std::string here = one(i);
    size_t end = i + 1;
    while (end < fibers.size() && one(end) == here) ++end;
    all += (i ? ", " : ": ") + text(static_cast<int64_t>(i)) + "-" + text(static_cast<int64_t>(end - 1)) + " " + here;
    i = end;
  }
  return all;
}

}  // namespace simt
