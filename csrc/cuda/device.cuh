// What every kernel stands on: dtypes, 16-byte accesses, reductions over warps, groups of threads and clusters. One
// source for nvcc, for NVRTC (which has no headers at all: nothing is included from the toolkit) and for the emulation
// on the CPU (emulation/simt.h). What is a PTX instruction here is a small inline function with a plain C++ body there.
//
// A .cu file is compiled once per dtype: FASTLM_DTYPE is 0, 1 or 2 and Scalar is its type. It ends with its instances:
//
//   FASTLM_KERNEL(gelu_forward, 3, 256, 4, GeluArguments, gelu_forward<Scalar, Activation::gelu>)
//                 kernel, variant, threads of a block at most, blocks of a multiprocessor at least, its one argument,
//                 a device function that takes it
#pragma once
#include "common.h"
#include "cuda/divider.h"

#ifdef FASTLM_EMULATED
#include "cuda/emulation/simt.h"
#define FASTLM_KERNEL(name, variant, threads, blocks, Arguments, ...) \
  static const int name##_##variant##_is_there = ::simt::add(         \
      FASTLM_OP, FASTLM_DTYPE, #name "_" #variant,                    \
      {[](const void* a) { __VA_ARGS__(*static_cast<const Arguments*>(a)); }, threads, sizeof(Arguments)});
#define FASTLM_UNROLL
#define FASTLM_ROLL
#else
#define FASTLM_KERNEL(name, variant, threads, blocks, Arguments, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks)       \
      name##_##variant(const __grid_constant__ Arguments arguments) { \
    __VA_ARGS__(arguments);                                           \
  }
#define FASTLM_UNROLL _Pragma("unroll")
#define FASTLM_ROLL _Pragma("unroll 1")
#endif

namespace fastlm::cuda {

#if FASTLM_DTYPE == 0
using Scalar = float;
#elif FASTLM_DTYPE == 1
using Scalar = bfloat16;
#elif FASTLM_DTYPE == 2
using Scalar = float16;
#else
#error "FASTLM_DTYPE is 0, 1 or 2"
#endif

constexpr unsigned FULL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// --- dtypes ----------------------------------------------------------------------------------------------------------

#ifdef FASTLM_EMULATED
inline float to_float(float16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
}
inline void from_float(float16& y, float x) {
  const _Float16 h = static_cast<_Float16>(x);
  std::memcpy(&y.bits, &h, 2);
}
inline void from_float(bfloat16& y, float x) {
  const uint32_t u = __float_as_uint(x);
  y.bits = x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
#else
__device__ __forceinline__ float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ void from_float(float16& y, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ __forceinline__ void from_float(bfloat16& y, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
#endif
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void from_float(float& y, float x) { y = x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
/// x rounded to the nearest T, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float x) {
  T y;
  from_float(y, x);
  return y;
}

// --- memory ----------------------------------------------------------------------------------------------------------

/// 16 bytes, one access of a thread.
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
/// How many T fit into 16 bytes.
template <class T>
constexpr int WIDTH = 16 / static_cast<int>(sizeof(T));

#ifdef FASTLM_EMULATED
inline Words load_words(const void* p) { return *static_cast<const Words*>(p); }
inline Words load_words_once(const void* p) { return *static_cast<const Words*>(p); }
inline void store_words(void* p, Words v) { *static_cast<Words*>(p) = v; }
inline void store_words_global(void* p, Words v) { *static_cast<Words*>(p) = v; }
inline void store_words_once(void* p, Words v) { *static_cast<Words*>(p) = v; }
#else
__device__ __forceinline__ Words load_words(const void* p) { return *static_cast<const Words*>(p); }
/// Read-only for the whole kernel and not needed again: passes the L1 cache by.
__device__ __forceinline__ Words load_words_once(const void* p) {
  Words v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ void store_words(void* p, Words v) { *static_cast<Words*>(p) = v; }
/// One access in any case: nvcc 13.0 makes four of some store_words() for sm_90.
__device__ __forceinline__ void store_words_global(void* p, Words v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
/// Not read again soon: the first to leave the L2 cache.
__device__ __forceinline__ void store_words_once(void* p, Words v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#endif

// Copies from global to shared memory that go on while the thread does: 16 bytes each, both addresses multiples of 16.
// copy_commit() closes a group of them; copy_wait<P>() waits for all groups of this thread but the last P. What arrived
// is seen by this thread; others need a barrier behind the wait.
//
// shared_address() is a place in the block's own shared memory as the instructions take it: 32 bits, which in a loop
// saves the arithmetic on pointers of 64.
#ifdef FASTLM_EMULATED
inline void copy_async(void* to, const void* from) { simt::copy_later(to, from); }
inline void copy_commit() { simt::commit_copies(); }
inline uint32_t shared_address(const void* p) {
  return simt::SHARED_BASE +
         static_cast<uint32_t>(static_cast<const char*>(p) - simt::shared_memory[simt::current->rank]);
}
inline Words load_shared(uint32_t from) { return load_words(simt::shared_at(from, 16, simt::Access::read)); }
inline void copy_async(uint32_t to, const void* from) {
  simt::copy_later(simt::shared_at(to, 16, simt::Access::copy), from);
}
template <int PENDING>
void copy_wait() {
  simt::finish_copies(PENDING);
}
#else
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  uint32_t address;
  asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(p));
  return address;
}
__device__ __forceinline__ Words load_shared(uint32_t from) {
  Words v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(void* to, const void* from) { copy_async(shared_address(to), from); }
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

/// Keeps the 16 bytes as they are from here on: what was unpacked from them before is not kept beside them.
__device__ __forceinline__ void keep_packed([[maybe_unused]] Words& v) {
#ifndef FASTLM_EMULATED
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
#endif
}

/// The 16 bytes as float32, and back.
template <class T>
__device__ __forceinline__ void unpack(Words v, float (&out)[WIDTH<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  FASTLM_UNROLL
  for (int i = 0; i < WIDTH<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      out[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
    }
  }
}
template <class T>
__device__ __forceinline__ Words pack(const float (&in)[WIDTH<T>]) {
  uint32_t words[4];
  FASTLM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(in[i]);
    } else {
#ifdef FASTLM_EMULATED
      words[i] = round_to<T>(in[2 * i]).bits | static_cast<uint32_t>(round_to<T>(in[2 * i + 1]).bits) << 16;
#else
      if constexpr (Same<T, bfloat16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
      }
#endif
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

/// The block's shared memory, from this many bytes on. All there is is asked for at the launch (Grid::shared).
template <class T>
__device__ __forceinline__ T* shared(int64_t bytes = 0) {
#ifdef FASTLM_EMULATED
  return reinterpret_cast<T*>(simt::shared_memory[simt::current->rank] + bytes);
#else
  extern __shared__ __align__(128) unsigned char fastlm_shared[];
  return reinterpret_cast<T*>(fastlm_shared + bytes);
#endif
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

#ifdef FASTLM_EMULATED
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float sqrt_fast(float x) { return sqrtf(x); }
inline float multiply(float a, float b) {
  float product = a * b;
  asm("" : "+x"(product));
  return product;
}
#else
/// 2^x to 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// To 1 ulp; results below 2^-126 are 0. One instruction: without ftz it takes seven.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// To 1 ulp.
__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// a * b, rounded: never made part of a fused multiplication and addition, whose bits would be others.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
#endif
/// e^x; results below 2^-126 are 0.
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& d) {
  return (__umulhi(n, d.magic) + n) >> d.shift;
}

/// 1 - 2 / (e^(2 x) + 1), to 4e-7 of the result: near 0, where that has lost its digits, the series.
__device__ __forceinline__ float tanh_fast(float x) {
  const float q = x * x;
  if (q < 0.0625f) return x * (q * (q * (q * (q * 0.021869489f - 0.053968254f) + 0.13333333f) - 0.33333333f) + 1);
  return 1 - 2 * reciprocal_fast(exp2_fast(x * (2 * LOG2_E)) + 1);
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // a NaN on either side stays
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// --- reductions: the same order, so the same bits, every time; every thread gets the result --------------------------

/// The value of the lane whose number differs in these bits. Overloaded for structs that are reduced.
template <class T>
__device__ __forceinline__ T exchange(T value, int lanes) {
  return __shfl_xor_sync(FULL, value, lanes);
}

/// Over GROUP neighbouring lanes of a warp (a power of two up to 32).
template <int GROUP = 32, class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
  FASTLM_UNROLL
  for (int lanes = GROUP / 2; lanes > 0; lanes /= 2) value = combine(value, exchange(value, lanes));
  return value;
}

/// Over groups of GROUP neighbouring threads (a power of two, up to the whole block). For GROUP > 32: `room` is
/// blockDim.x / 32 values of T in shared memory, and the block meets at two barriers, after which room is free again.
template <int GROUP, class T, class Combine>
__device__ __forceinline__ T group_reduce(T value, Combine combine, T* room) {
  value = warp_reduce<(GROUP < 32 ? GROUP : 32)>(value, combine);
  if constexpr (GROUP > 32) {
    constexpr int WARPS = GROUP / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) room[warp] = value;
    __syncthreads();
    value = warp_reduce<WARPS>(room[warp / WARPS * WARPS + lane % WARPS], combine);
    __syncthreads();
  }
  return value;
}

// --- clusters (sm_90) ------------------------------------------------------------------------------------------------

#ifdef FASTLM_EMULATED
inline int cluster_rank() { return static_cast<int>(simt::current->rank); }
inline void cluster_sync() { simt::wait(simt::State::at_cluster, 8); }
inline void cluster_arrive() {}
inline void cluster_begin() {}
inline void cluster_wait() { simt::wait(simt::State::at_cluster, 9); }
template <class T>
T* cluster_peer(T* mine, int rank) {
  return reinterpret_cast<T*>(simt::shared_memory[rank] +
                              (reinterpret_cast<char*>(mine) - simt::shared_memory[simt::current->rank]));
}
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// This block's place in its cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Every thread of every block of the cluster; what they wrote to shared memory is seen behind it. A block must not
/// end while others read its shared memory: sync once more after the last read.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// cluster_sync() in halves: cluster_wait() returns once every thread of the cluster has arrived.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/// cluster_arrive() that publishes nothing. At a kernel's start: another block's shared memory may be touched once that
/// block runs, which cluster_wait() then knows. Behind the last read of others' shared memory: a block may end then.
__device__ __forceinline__ void cluster_begin() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
/// The same place in another block's shared memory.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* mine, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(address);
}
#else  // no clusters there: launch.h never asks for one
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_begin() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* cluster_peer(T* mine, int) {
  return mine;
}
#endif

}  // namespace fastlm::cuda
