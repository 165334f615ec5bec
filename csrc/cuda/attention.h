// attention: what launchers and kernels share. attention.cpp chooses a path (attention_ampere.h, attention_hopper.h).
#pragma once
#include "common.h"

namespace fastlm::cuda {

/// Distances of neighbours in elements; along the last dimension it is 1.
struct Layout {
  int64_t batch, head, row;
};

enum class MaskKind : int { none, boolean, float32, bfloat16, float16 };

/// A call, forward or backward. Addresses of q, k, v, dout and out are multiples of 16 bytes, as are rows, heads and
/// batches; d and dv are multiples of 8. Packed sequences: one batch of total_q and total_k rows, `batches` sequences.
struct AttentionArguments {
  const void *q, *k, *v;  // (B, H, S, D), (B, Hk, T, D), (B, Hk, T, Dv)
  void* out;              // (B, H, S, Dv)
  float* lse;             // (B, H, S), natural logs; contiguous, as all float32 here
  const void* dout;       // (B, H, S, Dv)
  const float* dlse;      // (B, H, S) or null
  float* shift;           // (B, H, S): lse in the kernels' units, inf where a query sees nothing
  float* delta;           // (B, H, S): rowsum(dout * out) - dlse
  float* dq_sum;          // sum_tile() tiles of M * W in the order the path wants; zeroed by prepare
  void *dq, *dk, *dv;
  float* dsinks;  // (blocks of prepare), parts of a sum
  float* dbias;   // the shape of the mask, or (B, H, S or T): attention_ampere_bias
  Layout q_at, k_at, v_at, out_at, dout_at, dq_at, dk_at, dv_at;

  const void* mask;
  int64_t mask_batch, mask_head, mask_m, mask_n;  // strides in elements, 0 where it is broadcast
  const int64_t* seed;                            // one number
  const float* slopes;                            // of ALiBi
  int64_t slope_batch;                            // H, or 0 where all batches share them
  const float* sinks;                             // (H,), natural logits
  const int64_t *documents_q, *documents_k;       // (B, S), (B, T)
  const int* ranges;                              // (B, tiles, 4): attention.cu's document_ranges
  const int *cu_q, *cu_k;                         // (sequences + 1)
  int* turns;  // zeroed by prepare: [0] counts tiles of keys; [1 + sum_tile()] whose turn it is to add to that tile

  MaskKind mask_kind;
  int batches, heads, kv_heads;
  int len_q, len_k;      // S and T, or the longest sequences
  int total_q, total_k;  // S and T, or all rows of the pack
  int d, width_v;        // head dims of q and k, of v
  int tiles;             // of what the kernel holds, of the longest sequence
  int tiles_q;           // tiles of M queries that a head has in dq_sum and turns
  int span;              // heads whose tiles are interleaved
  int left, right;       // query i sees keys i + offset - left ... i + offset + right; FAR where there is no limit
  int align_end;         // offset is T - S, not 0
  int before, after;     // whether left, right are limits
  int ordered;           // blocks add to dq_sum in turn
  float factor;          // scale * log2(e), or scale / softcap where there is a softcap
  float softcap;         // * log2(e); 0 for none
  float scale;
  float keep_factor;   // 1 / (1 - dropout)
  uint32_t threshold;  // plan.h's drop_threshold; 0 for no dropout
};

/// A limit that is none.
constexpr int FAR = 1 << 30;

/// What the plain kernels do not do and the general ones do: whatever changes a logit or a weight beside positions.
/// Sinks, packed sequences, window and causal are plain.
inline bool is_general(const AttentionArguments& a) {
  return a.mask_kind != MaskKind::none || a.slopes || a.softcap > 0 || a.documents_q || a.threshold || !(a.factor > 0);
}

/// What a kernel of a path holds and walks over, and what it takes for that.
struct AttentionTile {
  int m, n;        // queries, keys
  int warps;       // of a block
  int stages;      // of what is walked over in shared memory
  bool general;    // does what is_general() says, else the plain rest
  int64_t shared;  // bytes of a block
};
/// What there is for a padded width, the best first; a kernel's variant is its index.
struct AttentionTiles {
  const AttentionTile* rows;
  int count;
};

/// Rows of q, k, v, dq in shared memory and registers: the smallest of these that holds both head dims.
constexpr int HEAD_DIMS[] = {32, 64, 96, 128, 192, 256};
/// The columns that a row has to hold.
constexpr int widest(const AttentionArguments& a) { return a.d > a.width_v ? a.d : a.width_v; }
/// Which of these widths, ascending, is the first to hold so many columns; COUNT where none does.
template <int COUNT>
constexpr int width_index(const int (&widths)[COUNT], int columns) {
  int i = 0;
  while (i < COUNT && widths[i] < columns) ++i;
  return i;
}

/// The gradient of the mask. A block sums m queries by n keys: over batches and heads that share what it writes where
/// dbias keeps queries (rows) and keys, else along what it does not keep. Its number: (outer * tiles_m + tile of
/// queries) * tiles_n + tile of keys.
struct AttentionBias {
  AttentionArguments call;           // dbias: (outer, S, T), (outer, T) or (outer, S)
  int tiles_m, tiles_n;              // 1 for what is not kept
  int kept_heads;                    // outer is batch * kept_heads + head of the first it sums
  int summed_batches, summed_heads;  // 1 unless both are kept
  int rows, keys;
};

// --- attention.cu: rows of 16-bit numbers, several to a warp

constexpr int SMALL_THREADS = 256, SMALL_ROWS = 64;  // of a block
/// Bytes of shared memory of prepare: a number for each row, and for each warp.
constexpr int SMALL_ROOM = 4 * (SMALL_ROWS + SMALL_THREADS / 32);
/// Lanes of a row, 16 bytes each: 4, 8, 16 or 32, for the variants 0 to 3.
constexpr int row_variant(int width) { return width <= 32 ? 0 : width <= 64 ? 1 : width <= 128 ? 2 : 3; }

struct AttentionPrepare {
  AttentionArguments call;
  int64_t sums, turns;  // numbers of dq_sum (a multiple of 4) and turns
};

struct AttentionFinish {
  AttentionArguments call;
  int m, width;  // of a tile of dq_sum
  int tiles;     // of SMALL_ROWS queries, of the longest sequence
};

struct AttentionClear {
  void* x;     // (heads, length, width)
  float* lse;  // (heads, length) or null
  const int* cu;
  Layout at;
  int sequences, length, width;
};

struct DocumentRanges {
  const int64_t *ids, *others;  // (B, length), (B, other_length)
  int* ranges;                  // (B, tiles, 4)
  int length, other_length, tiles, size, step;
};
constexpr int RANGES_THREADS = 256;

}  // namespace fastlm::cuda
