// attention on sm_90a (wgmma, TMA): what its launchers and kernels share. attention_hopper.cpp launches them.
#pragma once
#include "cuda/attention.h"
#include "cuda/tensor_map.h"

namespace fastlm::cuda {

/// Head dims of the kernels' rows: the smallest of these that holds both.
constexpr int HOPPER_HEAD_DIMS[] = {64, 128, 256};
/// A warp group: what a product of so many rows is of.
constexpr int GROUP_THREADS = 128;
constexpr int GROUP_ROWS = 64;
/// What a block of sm_90 has.
constexpr int64_t HOPPER_SHARED = 232448;
/// Panels of tiles start at multiples of this, the block's shared memory wherever it likes.
constexpr int PANEL_ALIGNMENT = 1024;
/// Columns of a panel: 128 bytes, as wide as the swizzle of copies and products.
constexpr int PANEL = 64;

// --- forward ---------------------------------------------------------------------------------------------------------

/// Rows of q with TMA's maps: {D, group, S, Hq / group, B} by boxes of {64, group, 64 / group, 1, 1}, so a tile's row r
/// is query r / group of head r % group of a key head. k, v: {D, 1, T, Hk, B} by {64, 1, n, 1, 1}. out, where group is
/// 1: {Dv, 1, S, H, B} by a warp's {64, 1, 16, 1, 1}. D and Dv as they are: the rest of a panel is loaded as zeros and
/// not stored.
struct HopperForwardArguments {
  TensorMap q, k, v, out;
  AttentionArguments a;
  int group;  // query heads that a tile holds: 1, or all that share a key head
  int heads;  // of q's map: heads / group
  int total;  // tiles of all heads and batches
};

constexpr int HOPPER_STAGES = 2;  // tiles of keys, and of values, in shared memory

/// A tile of m queries of which each consumer warp group has 64; one more warp group loads. `out` has its own room
/// where there is room, else that of q, and the next q has to wait for it.
constexpr bool hopper_forward_out_apart(int w, int m, int n) {
  return 2 * w * (2 * m + 2 * HOPPER_STAGES * n) + 2 * PANEL_ALIGNMENT <= HOPPER_SHARED;
}
constexpr AttentionTile hopper_forward_shape(int w, int m, int n, bool general) {
  const int rows = m * (hopper_forward_out_apart(w, m, n) ? 2 : 1) + 2 * HOPPER_STAGES * n;
  return {m,
          n,
          4 * (m / GROUP_ROWS + 1),
          HOPPER_STAGES,
          general,
          int64_t{2} * w * rows + 2 * PANEL_ALIGNMENT};  // and barriers
}
/// The plain one; of 128 columns, a wide one where all queries see all keys: the other wastes less at the diagonal.
/// Last the one that does softcap and documents, too; with 256 columns it would spill.
constexpr AttentionTile HOPPER_FORWARD_64[] = {hopper_forward_shape(64, 192, 128, false),
                                               hopper_forward_shape(64, 128, 128, true)};
constexpr AttentionTile HOPPER_FORWARD_128[] = {hopper_forward_shape(128, 128, 128, false),
                                                hopper_forward_shape(128, 128, 176, false),
                                                hopper_forward_shape(128, 128, 96, true)};
constexpr AttentionTile HOPPER_FORWARD_256[] = {hopper_forward_shape(256, 128, 80, false)};
constexpr AttentionTiles hopper_forward_tiles(int w) {
  if (w == 64) return {HOPPER_FORWARD_64, 2};
  if (w == 128) return {HOPPER_FORWARD_128, 3};
  return {HOPPER_FORWARD_256, 1};
}

// --- backward --------------------------------------------------------------------------------------------------------

/// k, v: {D, 1, T, Hk, B} by boxes of {64, 1, n, 1, 1}; q, dout: {D, 1, S, H, B} by {64, 1, m, 1, 1}.
struct HopperBackwardArguments {
  TensorMap q, k, v, dout;
  AttentionArguments a;
};

constexpr int HOPPER_BACKWARD_STAGES = 2;  // tiles of queries in shared memory, and of what is between two products

/// Shared memory of a block that holds n keys and walks over tiles of m queries: bytes from the first multiple of
/// PANEL_ALIGNMENT on.
struct HopperBackwardRoom {
  int keys, queries;      // bytes of a tile of k or v, of q or dout
  int k, v, q, dout, ds;  // where they are; q, dout and ds STAGES times
  int p, dq;              // where groups share columns, weights too, as often, and no room for dq
  int rows;               // shift and delta of the queries, STAGES times
  int barriers, number;   // of the block's tile
  int end;
};
/// Whether the two groups that compute share the columns of dk and dv, 64 keys both: those of 64 keys each would fill
/// their registers.
constexpr bool hopper_backward_splits(int w) { return w > 128; }
constexpr HopperBackwardRoom hopper_backward_room(int w, int m, int n) {
  constexpr int STAGES = HOPPER_BACKWARD_STAGES;
  HopperBackwardRoom r{2 * n * w, 2 * m * w, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  r.v = r.k + r.keys;
  r.q = r.v + r.keys;
  r.dout = r.q + STAGES * r.queries;
  r.ds = r.dout + STAGES * r.queries;
  r.p = r.ds + STAGES * 2 * m * n;
  r.dq = r.p + (hopper_backward_splits(w) ? STAGES * 2 * m * n : 0);
  r.rows = r.dq + (hopper_backward_splits(w) ? 0 : 4 * m * w);
  r.barriers = r.rows + STAGES * 8 * m;
  r.number = r.barriers + 8 * (1 + 4 * STAGES);
  r.end = r.number + 8;
  return r;
}
/// Two warp groups compute, one more loads and adds to dq, or takes the turns at that.
constexpr AttentionTile hopper_backward_tile(int w, int m, int n) {
  return {m, n, 12, HOPPER_BACKWARD_STAGES, false, hopper_backward_room(w, m, n).end + PANEL_ALIGNMENT};
}
constexpr AttentionTile HOPPER_BACKWARD_64[] = {hopper_backward_tile(64, 128, 128)};
constexpr AttentionTile HOPPER_BACKWARD_128[] = {hopper_backward_tile(128, 64, 128)};
constexpr AttentionTile HOPPER_BACKWARD_256[] = {hopper_backward_tile(256, 64, 64)};
constexpr AttentionTiles hopper_backward_tiles(int w) {
  if (w == 64) return {HOPPER_BACKWARD_64, 1};
  if (w == 128) return {HOPPER_BACKWARD_128, 1};
  return {HOPPER_BACKWARD_256, 1};
}

// --- launchers -------------------------------------------------------------------------------------------------------

/// The padded width of a call, 0 where head dims are wider than the widest.
constexpr int hopper_width(const AttentionArguments& a) {
  const int i = width_index(HOPPER_HEAD_DIMS, widest(a));
  return i < static_cast<int>(sizeof(HOPPER_HEAD_DIMS) / sizeof(int)) ? HOPPER_HEAD_DIMS[i] : 0;
}

/// Why this path does not take the call, in words; null where it does. Of what is_general() it has softcap and
/// documents, forward, up to 128 columns; the copy engine wants strides that are positive multiples of 16 bytes.
const char* why_not_hopper(DType dtype, const AttentionArguments& a, bool backward);

/// Of a call that it takes.
AttentionTile hopper_forward_tile(const AttentionArguments& a);
void launch_hopper_forward(DType dtype, AttentionArguments a, int device, Stream stream);

/// The tile of attention_hopper_backward, whose m and n say how large dq_sum and turns are and how many tiles there
/// are.
constexpr AttentionTile hopper_backward_tile(const AttentionArguments& a) {
  return hopper_backward_tiles(hopper_width(a)).rows[0];
}

/// Starts it: dk and dv, and what finish makes dq of. `a` is as prepare has it, tiles and span filled in.
void launch_hopper_backward(DType dtype, const AttentionArguments& a, int device, Stream stream);

}  // namespace fastlm::cuda
