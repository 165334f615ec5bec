// Launchers of attention's kernels for sm_90a: which calls they take, and maps of their tensors for the copy engine.
#include "cuda/attention_hopper.h"

#include <initializer_list>

#include "cuda/plan.h"

namespace fastlm::cuda {
namespace {

Kernel forwards[] = {{"attention_hopper_forward_64", "attention_hopper_forward"},
                     {"attention_hopper_forward_128", "attention_hopper_forward"},
                     {"attention_hopper_forward_256", "attention_hopper_forward"}},
       backwards[] = {{"attention_hopper_backward_64", "attention_hopper_backward"},
                      {"attention_hopper_backward_128", "attention_hopper_backward"},
                      {"attention_hopper_backward_256", "attention_hopper_backward"}};

/// Whether the engine can go along the tensor; launchers give what has one batch, head or row a distance that fits.
bool fits(const Layout& at) {
  for (const int64_t stride : {at.batch, at.head, at.row})
    if (stride <= 0 || stride % 8 || stride >= int64_t{1} << 39) return false;
  return true;
}

/// Rows of `group` neighbouring heads together, a panel wide; `box_rows` of them at once.
TensorMap map_of(DType dtype, const AttentionArguments& a, const void* base, const Layout& at, int width, int rows,
                 int heads, int group, int box_rows) {
  const int64_t batches = a.cu_q ? 1 : a.batches;
  return tensor_map(dtype, base, {width, group, rows, heads / group, batches},
                    {at.head, at.row, at.head * group, at.batch}, {PANEL, group, box_rows / group, 1, 1}, 2 * PANEL);
}

/// The part of tiles of m rows that is rows of a sequence, those of `group` heads together.
double filled(const AttentionArguments& a, int m, int group) {
  const int64_t rows = max(a.total_q / (a.cu_q ? a.batches : 1), 1) * group;
  return static_cast<double>(rows) / static_cast<double>(ceil_div(rows, m) * m);
}
/// Heads that share a key head go into one tile where tiles of one alone are far from full: threads, not the copy
/// engine, store them then.
int group_of(const AttentionArguments& a, int m) {
  const int group = a.heads / a.kv_heads;
  return GROUP_ROWS % group == 0 && filled(a, m, 1) < 0.9 * filled(a, m, group) ? group : 1;
}

int forward_variant(const AttentionArguments& a) {
  if (is_general(a)) return hopper_forward_tiles(hopper_width(a)).count - 1;
  return hopper_width(a) == 128 && !a.before && !a.after ? 1 : 0;
}
/// Whether no kernel here does what the call asks for.
bool is_foreign(AttentionArguments a, bool backward) {
  const AttentionTiles tiles = hopper_forward_tiles(hopper_width(a));
  if (!backward && tiles.rows[tiles.count - 1].general) {
    a.documents_q = nullptr;
    a.softcap = 0;
  }
  return is_general(a);
}

}  // namespace

const char* why_not_hopper(DType dtype, const AttentionArguments& a, bool backward) {
  if (dtype == DType::float32) return "float32";
  if (!hopper_width(a)) return "head dims above 256";
  if (is_foreign(a, backward)) return "an option of the general kernels";
  if (!a.batches || !a.total_q || !a.total_k) return "no rows";
  if (!fits(a.q_at) || !fits(a.k_at) || !fits(a.v_at)) return "strides that the copy engine does not take";
  if (!(backward ? fits(a.dout_at) : fits(a.out_at))) return "strides that the copy engine does not take";
  return nullptr;
}

AttentionTile hopper_forward_tile(const AttentionArguments& a) {
  return hopper_forward_tiles(hopper_width(a)).rows[forward_variant(a)];
}

void launch_hopper_forward(DType dtype, AttentionArguments a, int device, Stream stream) {
  const AttentionTile tile = hopper_forward_tile(a);
  const int group = tile.general ? 1 : group_of(a, tile.m);
  a.tiles = static_cast<int>(ceil_div(a.len_q, tile.m / group));
  const auto map = [&](const void* base, const Layout& at, int width, int rows, int heads, int together, int box) {
    return map_of(dtype, a, base, at, width, rows, heads, together, box);
  };
  const HopperForwardArguments h{map(a.q, a.q_at, a.d, a.total_q, a.heads, group, GROUP_ROWS),
                                 map(a.k, a.k_at, a.d, a.total_k, a.kv_heads, 1, tile.n),
                                 map(a.v, a.v_at, a.width_v, a.total_k, a.kv_heads, 1, tile.n),
                                 map(a.out, a.out_at, a.width_v, a.total_q, a.heads, 1, 16),
                                 a,
                                 group,
                                 a.heads / group,
                                 a.tiles * a.batches * (a.heads / group)};
  const Grid grid{min(h.total, cuda::device(device).sms), 32 * tile.warps, 1, tile.shared};
  forwards[width_index(HOPPER_HEAD_DIMS, widest(a))].launch(dtype, forward_variant(a), grid, h, device, stream);
}

void launch_hopper_backward(DType dtype, const AttentionArguments& a, int device, Stream stream) {
  const AttentionTile tile = hopper_backward_tile(a);
  const auto map = [&](const void* base, const Layout& at, int width, int rows, int heads, int box) {
    return map_of(dtype, a, base, at, width, rows, heads, 1, box);
  };
  const HopperBackwardArguments h{map(a.q, a.q_at, a.d, a.total_q, a.heads, tile.m),
                                  map(a.k, a.k_at, a.d, a.total_k, a.kv_heads, tile.n),
                                  map(a.v, a.v_at, a.width_v, a.total_k, a.kv_heads, tile.n),
                                  map(a.dout, a.dout_at, a.width_v, a.total_q, a.heads, tile.m), a};
  const Grid grid{int64_t{a.tiles} * a.batches * a.kv_heads, 32 * tile.warps, 1, tile.shared};
  backwards[width_index(HOPPER_HEAD_DIMS, widest(a))].launch(dtype, 0, grid, h, device, stream);
}

}  // namespace fastlm::cuda
