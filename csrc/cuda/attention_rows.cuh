// Tiles of rows of one head in shared memory, for mma.sync: how they get there and how fragments are loaded of them.
#pragma once
#include "cuda/attention.cuh"

namespace fastlm::cuda {

/// threadIdx.x, as if it were another each time: addresses are computed of it where they are used. Left to itself the
/// compiler computes all of them ahead of the loop that they are used in; where there are registers enough for that,
/// give threadIdx.x for the `thread` of what follows.
__device__ __forceinline__ int thread_here() {
#ifdef FASTLM_EMULATED
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
#endif
}

/// What is copied from global to shared memory: LANES neighbouring threads take a row, each the same columns of all its
/// rows, which lie at the same place of the swizzle. Rows of W numbers of 16 bits.
template <class T, int W, int THREADS>
struct HeadRows {
  static constexpr int LANES = W % 64 == 0 ? 8 : 4, CHUNKS = W / 8 / LANES, STEP = THREADS / LANES;
  static_assert(STEP % 8 == 0, "the period of the swizzle");
  const T* from;   // row 0, from this thread's first column on
  int64_t stride;  // of rows
  int rows, width;

  __device__ __forceinline__ HeadRows(const T* head, int64_t stride, int rows, int width)
      : from(head), stride(stride), rows(rows), width(width) {
    const int column = 8 * (thread_here() % LANES);
    if (column < width) from += column;
  }

  /// Rows first ... first + COUNT - 1, and zeros for what there is not: behind the last row where CUT, and columns.
  template <int COUNT, bool CUT>
  __device__ __forceinline__ void copy(uint32_t to, int first, int thread = thread_here()) const {
    static_assert(COUNT % STEP == 0, "every thread copies the same number of rows");
    const int row = thread / LANES, chunk = thread % LANES;
    to += swizzled<2 * W>(row, chunk);
    FASTLM_UNROLL
    for (int i = 0; i < COUNT / STEP; ++i) {
      const int r = first + row + i * STEP;
      const T* at = from + (CUT ? min_of(r, rows - 1) : r) * stride;
      FASTLM_UNROLL
      for (int j = 0; j < CHUNKS; ++j) {
        const bool inside = 8 * (chunk + LANES * j) < width;
        copy_async_or_zero(to + i * STEP * 2 * W + j * LANES * 16, inside ? at + 8 * LANES * j : at,
                           inside && (!CUT || r < rows));
      }
    }
  }
};

/// The address of this lane in a matrix of 16 x 16, `chunk` (even) chunks of 16 bytes further in its row of BYTES.
/// `at`: swizzled.
template <int BYTES>
__device__ __forceinline__ uint32_t along(uint32_t at, int chunk) {
  constexpr int PERIOD = BYTES % 128 == 0 ? 8 : BYTES % 64 == 0 ? 4 : 2;
  return (at ^ chunk % PERIOD << 4) + (chunk / PERIOD * PERIOD << 4);
}

/// A warp's operand of mma: matrices of 16 x 16 of a tile whose rows are BYTES. LEFT operands have rows m and columns
/// k, right ones rows k and columns n. How they lie: where TRANSPOSED the tile's rows are k, else m or n.
template <int BYTES, bool LEFT, bool TRANSPOSED>
struct Operand {
  uint32_t at;
  int chunk;

  /// `first`: the first m or n.
  __device__ __forceinline__ Operand(uint32_t tile, int first, int thread = thread_here()) {
    const int lane = thread % 32;
    at = tile + (TRANSPOSED ? 0 : first * BYTES);
    at += LEFT == TRANSPOSED ? swizzled<BYTES>(lane % 8 + lane / 16 * 8, lane / 8 % 2)
                             : swizzled<BYTES>(lane % 16, lane / 16);
    chunk = TRANSPOSED ? first / 8 : 0;
  }
  /// The 16 x 16 at m or n = 16 * block, k = 16 * step: a left operand of mma(), or two right ones.
  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const {
    constexpr int ROW = 16 * BYTES;  // added last: it is part of the instruction then
    if constexpr (TRANSPOSED) {
      load_matrices_transposed(r, along<BYTES>(at, chunk + 2 * block) + ROW * step);
    } else {
      load_matrices(r, along<BYTES>(at, 2 * step) + ROW * block);
    }
  }
};

/// d += a b for a warp's tile of 16 ROWS x 16 COLUMNS, k = 0 ... 16 * STEPS - 1.
template <class T, int STEPS, int ROWS, int NUMBERS, class Left, class Right>
__device__ __forceinline__ void multiply_tile(float (&d)[ROWS][NUMBERS], const Left& a, const Right& b) {
  FASTLM_UNROLL
  for (int k = 0; k < STEPS; ++k) {
    uint32_t left[ROWS][4];
    FASTLM_UNROLL
    for (int i = 0; i < ROWS; ++i) a.load(left[i], i, k);
    FASTLM_UNROLL
    for (int j = 0; j < NUMBERS / 8; ++j) {
      uint32_t right[4];
      b.load(right, j, k);
      FASTLM_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        mma<T>(d[i], 2 * j, left[i], right[0], right[1]);
        mma<T>(d[i], 2 * j + 1, left[i], right[2], right[3]);
      }
    }
  }
}

}  // namespace fastlm::cuda
