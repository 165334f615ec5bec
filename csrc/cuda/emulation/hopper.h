// hopper.cuh on the CPU: each function hands what it was given to the emulation (async.h).
#pragma once
#include "cuda/emulation/async.h"
#include "cuda/mma.cuh"
#include "cuda/tensor_map.h"

namespace fastlm::cuda {

inline void warpgroup_fence() { simt::warpgroup_fence(); }
inline void warpgroup_commit() { simt::warpgroup_commit(); }
template <int PENDING>
void warpgroup_wait() {
  simt::warpgroup_wait(PENDING);
}
template <int REGISTERS>
void ready(float (&)[REGISTERS]) {}

template <class T, int N, bool A_ACROSS = false, bool B_ACROSS = false>
void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  simt::multiply({a, b, N, add, Same<T, float16>::value, false, A_ACROSS, B_ACROSS}, d, nullptr);
}
template <class T, int N, bool B_ACROSS = false>
void multiply_mixed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  simt::multiply({0, b, N, add, Same<T, float16>::value, true, false, B_ACROSS}, d, a);
}

inline void barrier_init(uint32_t barrier, int arrivals) { simt::barrier_init(barrier, arrivals); }
inline void barrier_init_done() { simt::barrier_init_done(); }
inline void barrier_arrive(uint32_t barrier) { simt::barrier_arrive(barrier); }
inline void barrier_expect(uint32_t barrier, int bytes) { simt::barrier_expect(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, int parity) { simt::barrier_wait(barrier, parity); }
inline void named_sync(int number, int threads) { simt::named_barrier(number, threads, true); }
inline void named_arrive(int number, int threads) { simt::named_barrier(number, threads, false); }

template <int REGISTERS>
void registers_down() {
  simt::set_registers(REGISTERS, false);
}
template <int REGISTERS>
void registers_up() {
  simt::set_registers(REGISTERS, true);
}

inline void fence_async() { simt::fence_async(); }
inline void fence_async_global() {}  // blocks run one after the other
inline void prefetch(const TensorMap* tensor) { simt::tensor_of(tensor); }
inline void tile_load(uint32_t to, const TensorMap* tensor, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
  simt::tile_load(to, tensor, barrier, {{c0, c1, c2, c3, c4}});
}
inline void tile_store(const TensorMap* tensor, uint32_t from, int c0, int c1, int c2, int c3, int c4) {
  simt::tile_store(tensor, from, {{c0, c1, c2, c3, c4}});
}
inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  simt::bulk_load(to, from, bytes, barrier);
}
inline void bulk_add(float* to, uint32_t from, int bytes) { simt::bulk_add(to, from, bytes); }
inline void add_global(float* at, float v0, float v1, float v2, float v3) {
  if (reinterpret_cast<uintptr_t>(at) % 16) simt::fail("an addition to four neighbours at no multiple of 16");
  add_global(at, v0, v1);
  add_global(at + 2, v2, v3);
}
inline void bulk_commit() { simt::bulk_commit(); }
template <int PENDING>
void bulk_wait_read() {
  simt::bulk_wait(PENDING, false);
}
template <int PENDING>
void bulk_wait() {
  simt::bulk_wait(PENDING, true);
}

}  // namespace fastlm::cuda
