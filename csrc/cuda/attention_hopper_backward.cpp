#include "cuda/attention_hopper.h"
#include "cuda/launch.h"

namespace fastlm::cuda {
namespace {

Kernel backward_64("attention_hopper_backward_64", "attention_hopper_backward"),
    backward_128("attention_hopper_backward_128", "attention_hopper_backward");

/// Boxes of so many rows of a head and a panel.
TensorMap boxes(DType dtype, const void* x, const Layout& at, int width, int length, int heads, int batches, int rows) {
  return tensor_map(dtype, x, {width, 1, length, heads, batches}, {at.row, at.row, at.head, at.batch},
                    {PANEL, 1, rows, 1, 1}, 2 * PANEL);
}

}  // namespace

void launch_hopper_backward(DType dtype, const AttentionArguments& a, int device, Stream stream) {
  if (a.tiles == 0) return;
  const AttentionTile tile = hopper_backward_tile(a);
  const int batches = a.cu_q ? 1 : a.batches;
  const HopperBackwardArguments arguments{
      boxes(dtype, a.q, a.q_at, a.d, a.total_q, a.heads, batches, tile.m),
      boxes(dtype, a.k, a.k_at, a.d, a.total_k, a.kv_heads, batches, tile.n),
      boxes(dtype, a.v, a.v_at, a.width_v, a.total_k, a.kv_heads, batches, tile.n),
      boxes(dtype, a.dout, a.dout_at, a.width_v, a.total_q, a.heads, batches, tile.m),
      a,
  };
  (hopper_width(a) == 64 ? backward_64 : backward_128)
      .launch(dtype, 0, {int64_t{a.tiles} * a.batches * a.kv_heads, 32 * tile.warps, 1, tile.shared}, arguments, device,
              stream);
}

}  // namespace fastlm::cuda
