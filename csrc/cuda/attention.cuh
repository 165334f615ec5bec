// What the kernels of attention share: where a block stands, what it sees, logits and dropout of a fragment.
//
// Logits are in units of log2: exp2 is the instruction there is. What is walked over comes in three segments of whole
// tiles: one at the left edge of what is seen, the middle where everything is seen and no mask is computed, and one at
// the right edge. A fragment (mma.cuh) may lie either way, queries by rows or (KEYS_BY_ROWS) keys by rows.
#pragma once
#include "cuda/attention.h"
#include "cuda/mma.cuh"
#include "cuda/random.cuh"

namespace fastlm::cuda {

constexpr float INF = __builtin_bit_cast(float, 0x7f800000u);  // NVRTC has no other

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }

/// x, but what was computed from it before is not kept in registers until here.
__device__ __forceinline__ int forgotten(int x) {
#ifndef FASTLM_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

/// A tile of a head: heads go in groups of a.span that share the cache, tile after tile within one.
struct Place {
  int tile, batch, head;
};
/// `heads`: a.heads where the tiles are queries, a.kv_heads where they are keys.
__device__ __forceinline__ Place place(const AttentionArguments& a, int number, int heads) {
  const int per_group = a.tiles * a.span, group = number / per_group, rest = number % per_group;
  const int width = min_of(a.span, a.batches * heads - group * a.span);
  const int pair = group * a.span + rest % width;
  return {rest / width, pair / heads, pair % heads};
}

/// A sequence, or a batch.
struct Extent {
  int batch;             // to multiply strides with: 0 for packed sequences
  int start_q, start_k;  // its first rows in the pack
  int len_q, len_k;
  int distance;       // query i stands at key i + distance
  int before, after;  // query i sees keys i - before ... i + after
};
__device__ __forceinline__ Extent extent(const AttentionArguments& a, int batch) {
  Extent e{batch, 0, 0, a.len_q, a.len_k, 0, 0, 0};
  if (a.cu_q) {
    e.batch = 0;
    e.start_q = a.cu_q[batch];
    e.len_q = a.cu_q[batch + 1] - e.start_q;
    e.start_k = a.cu_k[batch];
    e.len_k = a.cu_k[batch + 1] - e.start_k;
  }
  e.distance = a.align_end ? e.len_k - e.len_q : 0;
  e.before = a.left - e.distance;
  e.after = a.right + e.distance;
  return e;
}
/// The number of a query in lse, shift, delta and in the hash of dropout.
__device__ __forceinline__ int64_t row_of(const AttentionArguments& a, const Extent& e, int head) {
  return (static_cast<int64_t>(e.batch) * a.heads + head) * a.total_q + e.start_q;
}
/// The number of tile m of a head's queries in dq_sum and turns. Packed sequences each begin a tile there. `size` is M
/// where it is known at run time alone.
template <int M = 0>
__device__ __forceinline__ int64_t sum_tile(const AttentionArguments& a, const Extent& e, int batch, int head, int m,
                                            int size = M) {
  if (a.cu_q) return static_cast<int64_t>(head) * a.tiles_q + (e.start_q / size + batch + m);
  return (static_cast<int64_t>(batch) * a.heads + head) * a.tiles_q + m;
}
/// Where such a tile of rows of W has an element on the path of sm_80: 8 x 8 follow each other, what one instruction of
/// a warp adds.
constexpr __device__ __forceinline__ int ampere_dq_place(int w, int row, int column) {
  return (row / 8 * (w / 8) + column / 8) * 64 + row % 8 * 8 + column % 8;
}
/// Where a tile of M rows of W has an element on the path of sm_90a: each warp group of its backward makes 64 x 64
/// of it, as many rows as there are or as many columns, and leaves it as its registers hold it, four by four.
constexpr __device__ __forceinline__ int hopper_dq_place(int w, int row, int column) {
  const int group = w == 64 ? row / 64 : column / 64, r = row % 64, c = column % 64;
  const int thread = r / 16 * 32 + r % 8 * 4 + c % 8 / 2;
  return group * 4096 + (c / 8 * 128 + thread) * 4 + r / 8 % 2 * 2 + c % 2;
}
template <class T>
__device__ __forceinline__ T* rows_of(T* base, const Layout& at, int batch, int head, int64_t row) {
  return base + batch * at.batch + head * at.head + row * at.row;
}

/// low ... middle: tiles at the edge; middle ... end: all is seen; max(middle, end) ... high: at the edge. All but high
/// are multiples of STEP. What rows first ... last see of `other`, where row r sees r - before ... r + after.
struct Range {
  int low, middle, end, high;
};
template <int STEP>
__device__ __forceinline__ Range seen_range(int first, int last, int other, bool has_before, int before, bool has_after,
                                            int after) {
  Range r{0, 0, other / STEP * STEP, other};
  if (has_after) {
    r.high = min_of(r.high, max_of(last + after + 1, 0));
    r.end = min_of(r.end, max_of(first + after + 1, 0) / STEP * STEP);
  }
  if (has_before) {
    r.low = max_of(first - before, 0) / STEP * STEP;
    r.middle = (max_of(last - before, 0) + STEP - 1) / STEP * STEP;
  }
  return r;
}
/// Of rows first ... first + ROWS - 1, of which there are `rows`.
template <int ROWS, int STEP>
__device__ __forceinline__ Range seen_range(int first, int rows, int other, bool has_before, int before, bool has_after,
                                            int after) {
  return seen_range<STEP>(first, min_of(first + ROWS, rows) - 1, other, has_before, before, has_after, after);
}
/// The tile of keys that the backward's block of this number holds. Where later queries alone see a key, a tile begins
/// at its diagonal, so the last is the first there: it starts first, and no tile waits for its turn.
__device__ __forceinline__ Place place_keys(const AttentionArguments& a, int number) {
  Place p = place(a, number, a.kv_heads);
  if (a.after) p.tile = a.tiles - 1 - p.tile;
  return p;
}
/// How many tiles of N keys add to tile m of M queries before tile n does, in the order of place_keys(). Those that add
/// to it follow each other, because what a tile of keys is seen by begins and ends no earlier than for the one before
/// it. The lowest is the one whose last key the tile's first query still sees, the highest the one whose first key the
/// last sees. A tile takes its turn at all m of its seen_range(), whether it has something to add or, by documents,
/// not.
template <int M, int N>
__device__ __forceinline__ int turn_of(const AttentionArguments& a, const Extent& e, int n, int m) {
  if (a.after) return min_of((m + 1) * M - 1 + e.after, e.len_k - 1) / N - n;
  return n - (a.before ? max_of(m * M - e.before, 0) / N : 0);
}
/// The same within what document_ranges wrote for a tile.
template <int STEP>
__device__ __forceinline__ Range narrowed(Range r, const int* ranges) {
  return {max_of(r.low, ranges[0] * STEP), max_of(r.middle, ranges[1] * STEP), min_of(r.end, ranges[2] * STEP),
          min_of(r.high, ranges[3] * STEP)};
}

/// The place of element e of a fragment whose first row and column (of this lane) are given.
__device__ __forceinline__ int fragment_row(int first, int e) { return first + 8 * (e >> 1 & 1); }
__device__ __forceinline__ int fragment_column(int first, int e) { return first + 8 * (e >> 2) + (e & 1); }
/// This lane's own: add to them where the fragment starts.
__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int lane_column() { return 2 * (static_cast<int>(threadIdx.x) % 4); }

/// -inf where positions hide a key: i - before <= j <= i + after, and j < len_k. Queries behind the last see nothing.
/// Two comparisons and a selection each: with bounds of rows, because a condition of more parts becomes branches.
template <bool KEYS_BY_ROWS, int R>
__device__ __forceinline__ void hide(float (&x)[R], int row, int column, const Extent& e, bool has_before,
                                     bool has_after) {
  int low[2], high[2];
  FASTLM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    if constexpr (KEYS_BY_ROWS) {
      low[half] = has_after ? r - e.after : 0;
      high[half] = r >= e.len_k ? -1 : min_of(has_before ? r + e.before : FAR, e.len_q - 1);
    } else {
      low[half] = r >= e.len_q ? FAR : has_before ? r - e.before : 0;
      high[half] = min_of(has_after ? r + e.after : FAR, e.len_k - 1);
    }
  }
  FASTLM_UNROLL
  for (int n = 0; n < R; ++n) {
    const int c = fragment_column(column, n), half = n / 2 % 2;
    x[n] = (c < low[half]) | (c > high[half]) ? -INF : x[n];
  }
}

/// A number of the mask, as float32.
__device__ __forceinline__ float mask_value(const void* mask, MaskKind kind, int64_t at) {
  if (kind == MaskKind::float32) return static_cast<const float*>(mask)[at];
  if (kind == MaskKind::bfloat16) return to_float(static_cast<const bfloat16*>(mask)[at]);
  if (kind == MaskKind::float16) return to_float(static_cast<const float16*>(mask)[at]);
  return static_cast<const uint8_t*>(mask)[at] ? 0.f : -INF;
}

/// Products q k^T to logits in log2 units with all options but positions, of one head: factor, softcap, mask, ALiBi,
/// documents, in this order. What is hidden is -inf. With STEEP `steep` becomes the slope of the softcap. Away
/// from the edge all of these queries and keys are of one document (document_ranges).
struct General {
  const AttentionArguments& a;
  const Extent& e;
  int64_t mask_at;  // of the head
  float slope;
  const int64_t *documents_q, *documents_k;  // of the batch

  __device__ __forceinline__ General(const AttentionArguments& a, const Extent& e, int head)
      : a(a),
        e(e),
        mask_at(e.batch * a.mask_batch + head * a.mask_head),
        slope(a.slopes ? a.slopes[e.batch * a.slope_batch + head] * LOG2_E : 0.f),
        documents_q(a.documents_q + static_cast<int64_t>(e.batch) * a.len_q),
        documents_k(a.documents_k + static_cast<int64_t>(e.batch) * a.len_k) {}

  template <bool KEYS_BY_ROWS, bool STEEP, int R>
  __device__ __forceinline__ void logits(float (&x)[R], float (&steep)[STEEP ? R : 1], int row, int column,
                                         bool edge) const {
    const auto i_of = [&](int n) { return KEYS_BY_ROWS ? fragment_column(column, n) : fragment_row(row, n); };
    const auto j_of = [&](int n) { return KEYS_BY_ROWS ? fragment_row(row, n) : fragment_column(column, n); };
    if (a.softcap > 0) {
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) {
        const float t = tanh_fast(x[n] * a.factor);
        if constexpr (STEEP) steep[n] = 1 - t * t;
        x[n] = t * a.softcap;
      }
    } else {
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) {
        if constexpr (STEEP) steep[n] = 1;
        x[n] *= a.factor;
      }
    }
    if (a.mask_kind != MaskKind::none) {
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) {
        const int i = i_of(n), j = j_of(n);
        if (i >= e.len_q || j >= e.len_k) continue;
        const float bias = mask_value(a.mask, a.mask_kind, mask_at + i * a.mask_m + j * a.mask_n);
        x[n] = bias == -INF ? -INF : x[n] + bias * LOG2_E;
      }
    }
    if (a.slopes) {
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) x[n] -= fabsf(static_cast<float>(i_of(n) + e.distance - j_of(n))) * slope;
    }
    if (edge && a.documents_q) {
      FASTLM_UNROLL
      for (int n = 0; n < R; ++n) {
        const int i = i_of(n), j = j_of(n);
        if (i >= e.len_q || j >= e.len_k || documents_q[i] != documents_k[j]) x[n] = -INF;
      }
    }
  }
};

}  // namespace fastlm::cuda
