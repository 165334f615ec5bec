// CUDA's execution model on a CPU, so that the kernels of csrc/cuda run in tests without a GPU: a fiber for each
// thread, the blocks of a cluster at a time. Compiled with g++ and -DFASTLM_EMULATED, the same .cu files register
// their kernels here; emulator.cpp launches them.
//
// A fiber runs until it reaches a barrier or a warp's collective and goes on when all that it waits for are there, so
// the order of threads between two barriers is the scheduler's: forward, reversed or shuffled. A missing barrier gives
// other results in another order; a barrier that not all threads reach, a collective that a warp's lanes do not reach
// together, and a block larger than its launch bounds are errors with the kernel's name. Shared memory is filled with
// NaN. AddressSanitizer sees accesses out of bounds, UBSan vectors that are not aligned.
//
// What sm_90a does beside its threads (copies of tiles, products of warp groups, barriers in memory) is async.h's.
//
// Not emulated: the memory model (a fence too few is not noticed, but fence_async()), timing, parallelism of blocks
// that are not of one cluster.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

enum class State { running, at_warp, at_group, at_block, at_cluster, blocked, done };

struct Fiber {
  void* stack_pointer;
  Dim thread, block;
  unsigned rank;        // of the block in its cluster
  unsigned warp, lane;  // warp: numbered through the cluster
  unsigned parity;      // of the warp's exchange buffer
  unsigned group_parity;
  int registers;
  int site;  // which collective the fiber waits in
  State state;
};

inline Fiber* current = nullptr;  // the thread that runs
inline Dim grid_size, block_size;
inline unsigned cluster_blocks = 1;
inline char* shared_memory[16] = {};  // of each block of the cluster
inline size_t shared_bytes = 0;       // of a block
constexpr unsigned MAX_WARPS = 32 * 16;
inline uint64_t exchange[MAX_WARPS][2][32];

constexpr int SYNCWARP = 3;  // site of __syncwarp()
/// Waits until the scheduler finds that the barrier is complete.
void wait(State barrier, int site);
/// Ends the launch with an error, from inside a kernel: does not return, though AddressSanitizer is not told so.
void fail(const std::string& message);

/// An event of the trace (emulator.h), where one is wanted.
inline bool tracing = false;
void note_now(const char* what, int64_t a, int64_t b, int64_t c);
inline void note(const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (tracing) note_now(what, a, b, c);
}

/// Every lane of the warp gives a value and may read those of all others.
template <class T>
const uint64_t* share(T value, int site) {
  static_assert(sizeof(T) <= 8, "one register pair");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  uint64_t* row = exchange[current->warp][current->parity];
  current->parity ^= 1;
  row[current->lane] = bits;
  wait(State::at_warp, site);
  return row;
}
template <class T>
T shuffle(T value, unsigned source, unsigned mask) {
  if (mask != 0xffffffffu) fail("a shuffle whose mask is not the whole warp");
  const uint64_t bits = share(value, 1)[source & 31];
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

/// What a warp's collective works with, beside one register of each lane.
struct Room {
  bool done;
  alignas(64) unsigned char bytes[2048];
};
inline Room rooms[MAX_WARPS][2];
/// Every lane of the warp gives something to the Shape that it shares with the others; when all are there, one of them
/// does the work. The Shape stays until the warp's next collective but one.
template <class Shape, class Give, class Work>
const Shape& together(int site, Give give, Work work) {
  static_assert(sizeof(Shape) <= sizeof(Room::bytes), "the room of a collective");
  Room& room = rooms[current->warp][current->parity];
  Shape& shape = *reinterpret_cast<Shape*>(room.bytes);
  current->parity ^= 1;
  room.done = false;
  give(shape);
  wait(State::at_warp, site);
  if (!room.done) {
    room.done = true;
    work(shape);
  }
  return shape;
}

/// Where shared memory begins, as instructions take it: a multiple of 128 and no more, which is all that is promised.
constexpr uint32_t SHARED_BASE = 1024 + 128;
enum class Access { read, write, copy };  // copy: to shared memory, until copy_wait()
/// Whether accesses of shared memory are told to touch().
inline bool watching = false;
void touch(uint32_t address, unsigned bytes, Access access);
/// Fails where a thread of the cluster has stores or additions under way.
void check_written();

/// A place in the block's shared memory, about to be read or written.
inline char* shared_at(uint32_t address, unsigned bytes, Access access) {
  if (address % bytes) fail("an address in shared memory that is no multiple of " + std::to_string(bytes));
  if (address < SHARED_BASE || address - SHARED_BASE + size_t{bytes} > shared_bytes)
    fail("an address outside the block's shared memory");
  if (watching) touch(address, bytes, access);
  return shared_memory[current->rank] + (address - SHARED_BASE);
}

// Asynchronous copies arrive as late as they may: until then their destination is NaN.
struct Copy {
  void* to;          // null: the end of a group
  const void* from;  // null: zeros
};
inline std::vector<Copy> copies[MAX_WARPS * 32];  // of each thread
inline std::vector<Copy>& my_copies() { return copies[current->warp * 32 + current->lane]; }
inline void copy_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("an asynchronous copy whose addresses are no multiples of 16");
  std::memset(to, 0xff, 16);
  my_copies().push_back({to, from});
}
inline void commit_copies() {
  note("copy_commit");
  my_copies().push_back({nullptr, nullptr});
}
inline void finish_copies(int pending) {
  note("copy_wait", pending);
  std::vector<Copy>& mine = my_copies();
  int groups = -pending;
  for (const Copy& copy : mine) groups += copy.to == nullptr;
  size_t done = 0;
  for (; groups > 0; ++done) {
    if (mine[done].to == nullptr)
      --groups;
    else if (mine[done].from)
      std::memcpy(mine[done].to, mine[done].from, 16);
    else
      std::memset(mine[done].to, 0, 16);
  }
  mine.erase(mine.begin(), mine.begin() + static_cast<std::ptrdiff_t>(done));
}

using Entry = void (*)(const void* arguments);
struct Instance {
  Entry entry;
  int threads;  // most of a block
  size_t arguments;
};
/// Called by FASTLM_KERNEL before main: op, dtype, "<kernel>_<variant>".
int add(const char* op, int dtype, const char* name, Instance instance);

}  // namespace simt

#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::current->block)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__

inline void __syncthreads() { simt::wait(simt::State::at_block, 2); }
inline void __syncwarp(unsigned mask = ~0u) {
  if (mask != ~0u) simt::fail("__syncwarp whose mask is not the whole warp");
  simt::wait(simt::State::at_warp, simt::SYNCWARP);
}
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return simt::shuffle(value, simt::current->lane ^ lanes, mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned source = simt::current->lane + lanes;
  return simt::shuffle(value, source < 32 ? source : simt::current->lane, mask);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = simt::current->lane;
  return simt::shuffle(value, lane >= lanes ? lane - lanes : lane, mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::shuffle(value, source, mask);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  if (mask != ~0u) simt::fail("a ballot whose mask is not the whole warp");
  const uint64_t* all = simt::share(static_cast<unsigned>(predicate != 0), 4);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(all[i]) << i;
  return result;
}
inline int __syncthreads_or(int predicate) {  // through the cluster's first lanes: correct, not fast
  static int any[16];
  if (predicate) any[simt::current->rank] = 1;
  simt::wait(simt::State::at_block, 5);
  const int result = any[simt::current->rank];
  simt::wait(simt::State::at_block, 6);
  any[simt::current->rank] = 0;
  simt::wait(simt::State::at_block, 7);
  return result;
}
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  if constexpr (std::is_same<T, int>::value) simt::note("count", reinterpret_cast<intptr_t>(at), before);
  *at = static_cast<T>(before + value);
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned before = *at;
  *at = before >= limit ? 0 : before + 1;
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  if (value < before) *at = value;
  return before;
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(__float_as_int(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __fdividef(float a, float b) { return a / b; }
