// Tensor cores as every GPU from sm_80 on has them: mma.sync with its fragments, the loads that make fragments of tiles
// in shared memory, and the swizzle of those tiles. PTX ISA 9.0, sections 9.7.14.5 (mma.m16n8k16: the layouts of
// fragments), 9.7.14.5.15 (ldmatrix), 9.7.14.5.16 (stmatrix), 9.7.9.25.3.1 (cp.async).
//
// Fragments, lane l of a warp, 16-bit T, two of them in a register, the lower column in the lower half:
//   A  16 x 16, 4 registers   register j: row l / 4 + 8 * (j % 2), columns 2 * (l % 4) + 8 * (j / 2) and the next
//   B  16 x 8, 2 registers    register j: column l / 4, rows 2 * (l % 4) + 8 * j and the next
//   D  16 x 8, 4 float32      element i: row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
// A product 16 x 8 n is float d[4 n], block after block: element i is at row l / 4 + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * (l % 4) + i % 2; wgmma's are the same (hopper.cuh). Two neighbouring blocks, rounded, are an A: no
// lane needs another's. fragment_of() does it.
//
// A tile lies in shared memory by rows of W bytes, W a multiple of 32; the 16-byte chunks of a row are permuted so that
// 8 rows at one chunk, which is what a phase of ldmatrix reads, lie in 8 different groups of banks: swizzled().
#pragma once
#include "cuda/device.cuh"

#ifdef FASTLM_EMULATED
#include "cuda/emulation/mma.h"
#endif

namespace fastlm::cuda {

/// Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows are W bytes: 32, 64 or a multiple of 64, by
/// the pattern of the widest power of two up to 128 that divides W: what copies of tiles by TMA call 32B, 64B and 128B.
template <int W>
constexpr __device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(W % 32 == 0, "whole sectors");
  if constexpr (W % 128 == 0) {
    return row * W + ((chunk ^ (row & 7)) << 4);
  } else if constexpr (W % 64 == 0) {
    return row * W + ((chunk ^ (row >> 1 & 3)) << 4);
  } else {
    return row * W + ((chunk ^ (row >> 2 & 1)) << 4);
  }
}

#ifndef FASTLM_EMULATED

/// d[4 at] ... d[4 at + 3] += a b. Also every lane of the warp together, as all below.
template <class T, int R>
__device__ __forceinline__ void mma(float (&d)[R], int at, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int i = 4 * at;
  if constexpr (Same<T, bfloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Four 8 x 8 matrices of 16 bits; lane l gives the shared address of row l % 8 of matrix l / 8. Register j of lane l:
/// row l / 4, columns 2 * (l % 4) and the next of matrix j; transposed: column l / 4, rows 2 * (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// copy_async() of 16 bytes, or of as many zeros where `there` is false; then nothing is read, but `from` must be an
/// address that could be.
__device__ __forceinline__ void copy_async_or_zero(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

/// One access of shared memory.
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, Words v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

/// Two numbers rounded to T, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t r;
  if constexpr (Same<T, bfloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// load_matrices() the other way round (sm_90).
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
#endif

/// *at += v in one access and without its old value; the order of threads is nobody's but who makes them wait.
__device__ __forceinline__ void add_global(float* at, float v) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory");
}
/// Of two neighbours, `at` a multiple of 8 bytes: one access from sm_90 on.
__device__ __forceinline__ void add_global(float* at, float v0, float v1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(v0), "f"(v1) : "memory");
#else
  add_global(at, v0);
  add_global(at + 1, v1);
#endif
}

// Turns: blocks that add to the same memory one after the other. await_turn() returns once *turn is `mine`, with all
// that was added before seen; pass_turn() makes it `next` behind all that this thread wrote or saw through a barrier.
__device__ __forceinline__ void await_turn(const int* turn, int mine) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != mine);
}
__device__ __forceinline__ void pass_turn(int* turn, int next) {
  asm volatile("fence.acq_rel.gpu;\nst.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}

#endif

/// Columns 16 k ... 16 k + 15 of a product, rounded to T, as the left operand of another product.
template <class T, int R>
__device__ __forceinline__ void fragment_of(uint32_t (&a)[4], const float (&d)[R], int k) {
  FASTLM_UNROLL
  for (int j = 0; j < 4; ++j) a[j] = pack2<T>(d[8 * k + 2 * j], d[8 * k + 2 * j + 1]);
}

}  // namespace fastlm::cuda
