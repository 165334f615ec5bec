// Backward by mma.sync: from products to weights and to gradients of logits, and how a block's warps share a product.
#pragma once
#include "cuda/attention_rows.cuh"

namespace fastlm::cuda {

/// How many of the warps share the rows of a product: so that a warp's part is as square as it can be, for it reads its
/// rows and its columns of the operands.
constexpr int warps_by_rows(int rows, int columns, int warps) {
  int best = 0;
  for (int r = warps; r > 0; r /= 2) {
    if (rows % (16 * r) || columns % (16 * (warps / r))) continue;
    if (!best || rows / r + columns / (warps / r) < rows / best + columns / (warps / best)) best = r;
  }
  return best;
}
/// A product of the block, R x C, and this warp's part of it.
template <int R, int C, int WARPS>
struct Part {
  static constexpr int BY_ROWS = warps_by_rows(R, C, WARPS), BY_COLUMNS = WARPS / BY_ROWS;
  static constexpr int ROWS = R / BY_ROWS, COLUMNS = C / BY_COLUMNS;  // of a warp
  static constexpr int BLOCKS = ROWS / 16, NUMBERS = COLUMNS / 2;     // of a lane: NUMBERS in each of BLOCKS
  static __device__ __forceinline__ int row() { return thread_here() / 32 / BY_COLUMNS * ROWS; }
  static __device__ __forceinline__ int column() { return thread_here() / 32 % BY_COLUMNS * COLUMNS; }
};

/// What there is one number of for each of M queries, in shared memory: shift, delta and, for dropout, the low and the
/// high half of its hash. A thread has one or none of the first two on its way from memory.
template <int M, bool GENERAL>
struct QueryNumbers {
  static constexpr int BYTES = 4 * M * (GENERAL ? 4 : 2);
  float* room;

  /// Shift is inf, and so the weights are 0, for queries behind the last.
  static __device__ __forceinline__ float load(const AttentionArguments& a, const Extent& e, int head, int m) {
    const int t = thread_here(), i = m + t % M;
    if (t >= 2 * M || i >= e.len_q) return t < M ? INF : 0.f;
    return (t < M ? a.shift : a.delta)[row_of(a, e, head) + i];
  }
  __device__ __forceinline__ void store(float number, const AttentionArguments& a, const Extent& e, int head,
                                        int m) const {
    const int t = thread_here();
    if (t < 2 * M) room[t] = number;
    if (GENERAL && a.threshold && t < M) {
      const RowDropout dropout(*a.seed, row_of(a, e, head) + m + t, a.threshold, a.keep_factor);
      room[2 * M + t] = __uint_as_float(dropout.low);
      room[3 * M + t] = __uint_as_float(dropout.high);
    }
  }
  /// Of the two rows of a fragment; a barrier behind store().
  struct Pair {
    float shift[2], delta[2];
    uint32_t low[2], high[2];
  };
  __device__ __forceinline__ Pair at(int row) const {
    Pair p;
    FASTLM_UNROLL
    for (int h = 0; h < 2; ++h) {
      p.shift[h] = room[row + 8 * h];
      p.delta[h] = room[M + row + 8 * h];
      p.low[h] = GENERAL ? __float_as_uint(room[2 * M + row + 8 * h]) : 0;
      p.high[h] = GENERAL ? __float_as_uint(room[3 * M + row + 8 * h]) : 0;
    }
    return p;
  }
};

/// From fragments of s = q k^T and dp = dout v^T at query i and key j to those of the weights, as dropout leaves them
/// and without its factor, and of the gradients of the logits: with STEEP before the softcap, else behind it.
template <bool GENERAL, bool STEEP, int R, class Pair>
__device__ __forceinline__ void weigh_fragment(float (&s)[R], float (&dp)[R], const AttentionArguments& a,
                                               const Extent& e, int head, int i, int j, bool edge, const Pair& row) {
  [[maybe_unused]] float steep[STEEP ? R : 1];
  if constexpr (GENERAL) General(a, e, head).template logits<false, STEEP>(s, steep, i, j, edge);
  if (edge) hide<false>(s, i, j, e, a.before, a.after);
  FASTLM_UNROLL
  for (int n = 0; n < R; ++n) s[n] = exp2_fast((GENERAL ? s[n] : s[n] * a.factor) - row.shift[n >> 1 & 1]);
  [[maybe_unused]] uint32_t dropped = 0;  // a bit for each
  if constexpr (GENERAL) {
    static_assert(R <= 32, "bits");
    if (a.threshold) {
      RowDropout dropout(0, 0, a.threshold, a.keep_factor);
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) {
        dropout.low = row.low[n >> 1 & 1];
        dropout.high = row.high[n >> 1 & 1];
        const bool out = dropout.dropped(fragment_column(j, n));
        dp[n] = out ? 0.f : dp[n] * a.keep_factor;
        if (out) dropped |= 1u << n;
      }
    }
  }
  FASTLM_UNROLL
  for (int n = 0; n < R; ++n) {
    dp[n] = s[n] * (dp[n] - row.delta[n >> 1 & 1]);
    if constexpr (STEEP) dp[n] *= steep[n];
  }
  if (GENERAL || edge) {
    FASTLM_UNROLL
    for (int n = 0; n < R; ++n) {
      if (s[n] == 0) dp[n] = 0;  // a value that is not finite, of a key that is not seen
    }
  }
  if constexpr (GENERAL) {
    FASTLM_UNROLL
    for (int n = 0; n < R; ++n) {
      if (dropped >> n & 1) s[n] = 0;
    }
  }
}

}  // namespace fastlm::cuda
