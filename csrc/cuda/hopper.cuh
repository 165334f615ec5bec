// What sm_90a alone has: products of a warp group (wgmma), copies of tiles by the copy engine (TMA), barriers in shared
// memory that both work with, and registers handed from one warp group to another. Each is one instruction and named
// after what it does; the sections are those of the PTX ISA 9.0.
//
// Order, as the hardware asks for it:
//   - registers that a product reads or adds to: warpgroup_fence() behind their last change and in front of the
//   product;
//     nothing touches them from there to the warpgroup_wait() that covers it.
//   - shared memory written by threads (st.shared, stmatrix) and read by a product or the copy engine: every thread
//   that
//     wrote calls fence_async() behind its writes, then a barrier, then the reader goes.
//   - shared memory written by the copy engine: seen by whoever has waited for the barrier that counts its bytes.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/tensor_map.h"

#ifdef FASTLM_EMULATED
#include "cuda/emulation/hopper.h"
#endif

namespace fastlm::cuda {

// --- descriptors of operands in shared memory: 9.7.15.5.1 ------------------------------------------------------------
// A tile of R rows lies as panels of [R][SWIZZLE bytes], each swizzled() as a tile of that width and starting at a
// multiple of 8 * SWIZZLE bytes: what tma_load() writes. SWIZZLE is 128, or 64 for a tile of 32 columns.
//   along: rows are M (or N), the sum goes along the row. The next 16 of the sum: 32 bytes on, within the panel.
//   across: rows are the sum, M (or N) goes along the row and from panel to panel, which lie `panel` bytes apart. The
//   next 16 of the sum: 16 rows on.

template <int SWIZZLE>
constexpr __device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel = 16) {
  static_assert(SWIZZLE == 128 || SWIZZLE == 64, "the widths of a panel");
  constexpr uint64_t MODE = SWIZZLE == 128 ? 1 : 2, STRIDE = 8 * SWIZZLE >> 4;
  return MODE << 62 | STRIDE << 32 | static_cast<uint64_t>(panel >> 4) << 16 | (address & 0x3ffff) >> 4;
}
template <int SWIZZLE>
constexpr __device__ __forceinline__ uint64_t descriptor_along(uint32_t address) {
  return descriptor<SWIZZLE>(address);
}
template <int SWIZZLE>
constexpr __device__ __forceinline__ uint64_t descriptor_across(uint32_t address, uint32_t panel) {
  return descriptor<SWIZZLE>(address, panel);
}

#ifndef FASTLM_EMULATED

// --- products of a warp group: 9.7.15 --------------------------------------------------------------------------------
// D, 64 x N float32, N / 2 registers: warp w of the group, lane l, register i: row 16 w + l / 4 + 8 * (i / 2 % 2),
// column 8 * (i / 4) + 2 * (l % 4) + i % 2. So D's registers are those of mma()'s fragments, one after the other, and
// what fragment_of() makes of them is the A in registers, 64 x 16.

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// All products since the last one are a group.
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// All groups but the last PENDING are done.
template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/// Stands behind warpgroup_wait() for every accumulator it covers: the compiler reads it no earlier.
template <int REGISTERS>
__device__ __forceinline__ void ready(float (&d)[REGISTERS]) {
  FASTLM_UNROLL
  for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTLM_D8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTLM_D16(i) FASTLM_D8(i), FASTLM_D8(i + 8)
#define FASTLM_D32(i) FASTLM_D16(i), FASTLM_D16(i + 16)
#define FASTLM_D40(i) FASTLM_D32(i), FASTLM_D8(i + 32)
#define FASTLM_D48(i) FASTLM_D32(i), FASTLM_D16(i + 32)
#define FASTLM_D64(i) FASTLM_D32(i), FASTLM_D32(i + 32)
#define FASTLM_D88(i) FASTLM_D48(i), FASTLM_D40(i + 48)
#define FASTLM_D96(i) FASTLM_D64(i), FASTLM_D32(i + 64)
#define FASTLM_D128(i) FASTLM_D64(i), FASTLM_D64(i + 64)
#define FASTLM_P16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTLM_P32 \
  FASTLM_P16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLM_P40 \
  FASTLM_P32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTLM_P48 \
  FASTLM_P40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTLM_P64 \
  FASTLM_P48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLM_P88                                                                                         \
  FASTLM_P64                                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87"
#define FASTLM_P96 \
  FASTLM_P88       \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTLM_P128                                                                                      \
  FASTLM_P96                                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d += a b, or d = a b unless `add`: A and B by their descriptors (shared), or A in registers (mixed). The number of
// D's registers decides those of the operands behind them, so both texts are written for each N.
template <class T, int N>
struct Product;
#define FASTLM_PRODUCT(TYPE, NAME, N, R, X0, X1, X2, X3, X4, X5, X6)                                                  \
  template <>                                                                                                         \
  struct Product<TYPE, N> {                                                                                           \
    template <bool A_ACROSS, bool B_ACROSS>                                                                           \
    static __device__ __forceinline__ void shared(float (&d)[R], uint64_t a, uint64_t b, bool add) {                  \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #X2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                   "." NAME " {" FASTLM_P##R "}, %" #X0 ", %" #X1 ", p, 1, 1, %" #X3 ", %" #X4 "; }"                  \
                   : FASTLM_D##R(0)                                                                                   \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(A_ACROSS ? 1 : 0), "n"(B_ACROSS ? 1 : 0)         \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    template <bool B_ACROSS>                                                                                          \
    static __device__ __forceinline__ void mixed(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add) {       \
      asm volatile(                                                                                                   \
          "{ .reg .pred p; setp.ne.b32 p, %" #X5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME \
          " {" FASTLM_P##R "}, {%" #X0 ", %" #X1 ", %" #X2 ", %" #X3 "}, %" #X4 ", p, 1, 1, %" #X6 "; }"              \
          : FASTLM_D##R(0)                                                                                            \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(B_ACROSS ? 1 : 0)     \
          : "memory");                                                                                                \
    }                                                                                                                 \
  };
FASTLM_PRODUCT(bfloat16, "bf16", 32, 16, 16, 17, 18, 19, 20, 21, 22)
FASTLM_PRODUCT(bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTLM_PRODUCT(bfloat16, "bf16", 80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTLM_PRODUCT(bfloat16, "bf16", 96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTLM_PRODUCT(bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTLM_PRODUCT(bfloat16, "bf16", 176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTLM_PRODUCT(bfloat16, "bf16", 192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTLM_PRODUCT(bfloat16, "bf16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
FASTLM_PRODUCT(float16, "f16", 32, 16, 16, 17, 18, 19, 20, 21, 22)
FASTLM_PRODUCT(float16, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTLM_PRODUCT(float16, "f16", 80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTLM_PRODUCT(float16, "f16", 96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTLM_PRODUCT(float16, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTLM_PRODUCT(float16, "f16", 176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTLM_PRODUCT(float16, "f16", 192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTLM_PRODUCT(float16, "f16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef FASTLM_PRODUCT

/// d (64 x N, registers) += a b, or = where not `add`. Goes on until warpgroup_wait().
template <class T, int N, bool A_ACROSS = false, bool B_ACROSS = false>
__device__ __forceinline__ void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  Product<T, N>::template shared<A_ACROSS, B_ACROSS>(d, a, b, add);
}
/// The same with A in registers, which stay as they are until warpgroup_wait(), too.
template <class T, int N, bool B_ACROSS = false>
__device__ __forceinline__ void multiply_mixed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  Product<T, N>::template mixed<B_ACROSS>(d, a, b, add);
}

// --- barriers in shared memory: 9.7.13.15 ----------------------------------------------------------------------------
// Eight bytes each. A phase ends when as many threads have arrived as it counts and all bytes announced have landed.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Behind all barrier_init(), by who called them, and in front of a __syncthreads().
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives, and announces so many bytes for this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Returns once the phase of this parity has ended: a fresh barrier is in phase 0, and 1 counts as ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred P;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n@P bra DONE_%=;\n"
      "bra WAIT_%=;\nDONE_%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- barriers by number: 9.7.13.1 ------------------------------------------------------------------------------------
// 1 ... 15; 0 is __syncthreads(). `threads`: all that take part, those that wait and those that only arrive.

__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- registers: 9.7.19.5 ---------------------------------------------------------------------------------------------
// setmaxnreg: every warp of the group, once.
template <int REGISTERS>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- the copy engine: 9.7.9.25, 9.7.9.27 -----------------------------------------------------------------------------

/// What threads wrote to shared memory is seen by products and by the copy engine. 9.7.13.4.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// What this thread knows to be written to global memory, it does through the copy engine later than that.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// One box of a tensor to shared memory; `barrier` gets its bytes, all of the box, zeros where it leaves the tensor.
/// One thread. Places in elements, innermost dimension first.
__device__ __forceinline__ void tile_load(uint32_t to, const TensorMap* tensor, uint32_t barrier, int c0, int c1,
                                          int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(to),
      "l"(tensor), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
/// A box from shared memory; what leaves the tensor is not written. Of the thread's bulk group.
__device__ __forceinline__ void tile_store(const TensorMap* tensor, uint32_t from, int c0, int c1, int c2, int c3,
                                           int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(tensor),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
/// The descriptor of a tensor into its cache. 9.7.9.15.
__device__ __forceinline__ void prefetch(const TensorMap* tensor) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor) : "memory");
}
/// `bytes` that follow each other; both addresses and bytes multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(to),
               "l"(from), "r"(barrier), "r"(bytes)
               : "memory");
}
/// to[i] += from[i], float32. Of the thread's bulk group.
__device__ __forceinline__ void bulk_add(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
/// add_global() of four neighbours, `at` a multiple of 16 bytes: one access. 9.7.13.6.
__device__ __forceinline__ void add_global(float* at, float v0, float v1, float v2, float v3) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(v0), "f"(v1), "f"(v2), "f"(v3)
               : "memory");
}
/// The stores and additions of this thread since the last one are a group.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// The shared memory of all groups but the last PENDING has been read.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
/// And what they write is written. In front of the kernel's end, and of whatever tells others of it.
template <int PENDING>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

}  // namespace fastlm::cuda
