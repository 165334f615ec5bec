// Which path and tile a call takes, what it needs beside its tensors, and the order of its kernels.
#include "cuda/attention.h"

#include <stdexcept>

#include "cuda/attention_ampere.h"
#include "cuda/attention_hopper.h"
#include "cuda/plan.h"
#include "fastlm.h"

namespace fastlm::cuda {
namespace {

// A kernel for each of HEAD_DIMS, in a unit of its own.
#define FASTLM_WIDTHS(name)                                                                                 \
  {                                                                                                         \
    {name "_32", name}, {name "_64", name}, {name "_96", name}, {name "_128", name}, {name "_192", name}, { \
      name "_256", name                                                                                     \
    }                                                                                                       \
  }
Kernel forward[] = FASTLM_WIDTHS("attention_ampere_forward"), backward[] = FASTLM_WIDTHS("attention_ampere_backward"),
       bias[] = FASTLM_WIDTHS("attention_ampere_bias");
#undef FASTLM_WIDTHS
Kernel prepare("attention", "attention_prepare"), finish("attention", "attention_finish"),
    finish_hopper("attention", "attention_finish_hopper"), clear("attention", "attention_clear"),
    ranges("attention", "document_ranges");

/// The index of the padded width in HEAD_DIMS.
int width_of(const AttentionArguments& a) {
  const int columns = widest(a), i = width_index(HEAD_DIMS, columns);
  if (i < static_cast<int>(sizeof(HEAD_DIMS) / sizeof(int))) return i;
  throw std::invalid_argument("head dims must be at most 256, got " + std::to_string(columns));
}

/// What runs a call.
struct Choice {
  bool hopper;
  int width;  // its index on the path of ampere
  int variant;
  AttentionTile tile;
};

Choice choose_ampere(AttentionTiles (*tiles)(int), const AttentionArguments& a, const Device& gpu) {
  const int width = width_of(a);
  const AttentionTiles found = tiles(HEAD_DIMS[width]);
  for (int i = 0; i < found.count; ++i) {
    const AttentionTile& tile = found.rows[i];
    if (tile.general >= is_general(a) && tile.shared <= gpu.shared) return {false, width, i, tile};
  }
  throw std::runtime_error("no tile of attention fits " + std::to_string(gpu.shared) + " bytes of shared memory");
}

/// The width of rows in dq_sum.
int padded(const Choice& choice, const AttentionArguments& a) {
  return choice.hopper ? hopper_width(a) : HEAD_DIMS[choice.width];
}

Choice choose(const AttentionCall& call, const AttentionArguments& a, bool is_backward, const Device& gpu) {
  if (call.hopper && gpu.arch == 90 && !why_not_hopper(call.dtype, a, is_backward))
    return {true, 0, 0, is_backward ? hopper_backward_tile(a) : hopper_forward_tile(a)};
  return choose_ampere(is_backward ? ampere_backward : ampere_forward, a, gpu);
}

/// Strides of a tensor of so many batches, heads and rows; what has but one of them has no distance.
Layout layout(const Strides& strides, int64_t batches, int64_t heads, int64_t rows) {
  const auto apart = [&](int i, int64_t n) { return n > 1 ? strides[i] : int64_t{8}; };
  return {apart(0, batches), apart(1, heads), apart(2, rows)};
}

AttentionArguments arguments(const AttentionCall& call) {
  const AttentionOptions& o = call.options;
  if (call.S >= FAR || call.T >= FAR) throw std::invalid_argument("attention: a sequence must be below 2^30 rows");
  AttentionArguments a{};
  a.q = call.q;
  a.k = call.k;
  a.v = call.v;
  a.q_at = layout(call.q_strides, call.B, call.H, call.S);
  a.k_at = layout(call.k_strides, call.B, call.Hk, call.T);
  a.v_at = layout(call.v_strides, call.B, call.Hk, call.T);
  constexpr MaskKind KINDS[] = {MaskKind::none, MaskKind::float32, MaskKind::bfloat16, MaskKind::float16,
                                MaskKind::boolean};
  a.mask_kind = KINDS[call.mask_type + 1];
  a.mask = call.mask;
  a.mask_batch = call.mask_strides[0];
  a.mask_head = call.mask_strides[1];
  a.mask_m = call.mask_strides[2];
  a.mask_n = call.mask_strides[3];
  a.seed = call.seed;
  a.slopes = o.alibi;
  a.slope_batch = o.alibi_batch;
  a.sinks = o.sinks;
  a.documents_q = static_cast<const int64_t*>(o.documents_q);
  a.documents_k = static_cast<const int64_t*>(o.documents_k);
  a.cu_q = o.cu_seqlens_q;
  a.cu_k = o.cu_seqlens_k;
  a.total_q = static_cast<int>(call.S);
  a.total_k = static_cast<int>(call.T);
  a.batches = static_cast<int>(a.cu_q ? o.sequences : call.B);
  a.len_q = a.cu_q ? static_cast<int>(min(o.longest_q, call.S)) : a.total_q;
  a.len_k = a.cu_q ? static_cast<int>(min(o.longest_k, call.T)) : a.total_k;
  a.heads = static_cast<int>(call.H);
  a.kv_heads = static_cast<int>(call.Hk);
  a.d = static_cast<int>(call.D);
  a.width_v = static_cast<int>(call.Dv);
  a.before = o.left < FAR;
  a.after = call.right < FAR;
  a.left = static_cast<int>(min(o.left, FAR));
  a.right = static_cast<int>(min(call.right, FAR));
  a.align_end = call.bottom_right;
  a.scale = call.scale;
  a.factor = o.softcap > 0 ? call.scale / o.softcap : call.scale * 1.4426950408889634f;
  a.softcap = o.softcap * 1.4426950408889634f;
  a.threshold = drop_threshold(call.dropout);
  a.keep_factor = static_cast<float>(1 / (1 - call.dropout));
  return a;
}

/// Heads whose tiles are interleaved, longest first: as many as half the L2 cache holds the other side of.
int span(const AttentionArguments& a, int64_t rows, int64_t heads, const Device& gpu) {
  if (!a.after) return 1;
  const int64_t bytes = max(rows * (a.d + a.width_v) * 2, 1);
  return static_cast<int>(max(min(a.batches * heads, gpu.l2 / 2 / bytes), 1));
}

/// tiles and span of a kernel that holds tiles of queries or, in the backward, of keys.
void hold(AttentionArguments& a, const AttentionTile& tile, bool keys, const Device& gpu) {
  a.tiles = static_cast<int>(keys ? ceil_div(a.len_k, tile.n) : ceil_div(a.len_q, tile.m));
  a.span = keys ? span(a, int64_t{a.len_q} * (a.heads / a.kv_heads), a.kv_heads, gpu) : span(a, a.len_k, a.heads, gpu);
  const int64_t rows = a.cu_q ? a.total_q / tile.m + a.batches : ceil_div(a.len_q, tile.m);
  a.tiles_q = static_cast<int>(rows);
}
int64_t pairs(const AttentionArguments& a) { return int64_t{a.cu_q ? 1 : a.batches} * a.heads; }
int64_t sum_tiles(const AttentionArguments& a) { return pairs(a) * a.tiles_q; }
int64_t range_count(const AttentionArguments& a) { return a.documents_q ? int64_t{4} * a.batches * a.tiles : 0; }

/// Which tiles of the other side those of `a` share documents with.
void find_ranges(AttentionArguments& a, const AttentionTile& tile, bool keys, int* found, int device, Stream stream) {
  if (!a.documents_q) return;
  DocumentRanges r{a.documents_q, a.documents_k, found, a.len_q, a.len_k, a.tiles, tile.m, tile.n};
  if (keys) r = {a.documents_k, a.documents_q, found, a.len_k, a.len_q, a.tiles, tile.n, tile.m};
  ranges.launch(DType::float32, 0, {int64_t{a.batches} * a.tiles, RANGES_THREADS, 1, 64 * 8}, r, device, stream);
  a.ranges = found;
}

/// Rows behind the last packed sequence.
void clear_rest(DType dtype, void* x, float* lse, const int* cu, const Layout& at, const AttentionArguments& a,
                int heads, int length, int width, int device, Stream stream) {
  if (!cu) return;
  const AttentionClear c{x, lse, cu, at, a.batches, length, width};
  clear.launch(dtype, 0, {heads * ceil_div(length, SMALL_ROWS), SMALL_THREADS}, c, device, stream);
}

/// A kernel of the path of ampere, a block for each tile of each of `heads`.
void start(Kernel (&kernels)[6], DType dtype, const Choice& choice, const AttentionArguments& a, int heads, int device,
           Stream stream) {
  const Grid grid{int64_t{a.tiles} * a.batches * heads, 32 * choice.tile.warps, 1, choice.tile.shared};
  kernels[choice.width].launch(dtype, choice.variant, grid, a, device, stream);
}

}  // namespace

AttentionPlan attention_plan(AttentionCall call, bool is_backward, Strides strides, int device) {
  const Device& gpu = cuda::device(device);
  AttentionArguments a = arguments(call);
  (is_backward ? a.dout_at : a.out_at) = layout(strides, call.B, call.H, call.S);
  const Choice choice = choose(call, a, is_backward, gpu);
  hold(a, choice.tile, is_backward, gpu);
  AttentionPlan plan{choice.hopper ? "hopper" : "ampere", choice.tile.m, choice.tile.n, range_count(a), 0, 0, 0};
  if (is_backward) {
    std::get<4>(plan) = sum_tiles(a) * choice.tile.m * padded(choice, a);
    std::get<5>(plan) = 1 + sum_tiles(a);
    std::get<6>(plan) = a.sinks ? pairs(a) * ceil_div(a.total_q, SMALL_ROWS) : 0;
  }
  return plan;
}

void attention_forward(AttentionCall call, void* out, Strides out_strides, float* lse, int* found, int device,
                       Stream stream) {
  const Device& gpu = cuda::device(device);
  AttentionArguments a = arguments(call);
  a.out = out;
  a.out_at = layout(out_strides, call.B, call.H, call.S);
  a.lse = lse;
  const Choice choice = choose(call, a, false, gpu);
  clear_rest(call.dtype, out, lse, a.cu_q, a.out_at, a, a.heads, a.total_q, a.width_v, device, stream);
  hold(a, choice.tile, false, gpu);
  find_ranges(a, choice.tile, false, found, device, stream);
  if (choice.hopper) return launch_hopper_forward(call.dtype, a, device, stream);
  start(forward, call.dtype, choice, a, a.heads, device, stream);
}

void attention_backward(AttentionCall call, const void* out, Strides out_strides, const void* dout,
                        Strides dout_strides, float* lse, const float* dlse, void* dq, Strides dq_strides, void* dk,
                        Strides dk_strides, void* dv, Strides dv_strides, float* dsinks, float* shift, float* delta,
                        float* dq_sum, int* turns, int* found, bool ordered, int device, Stream stream) {
  const Device& gpu = cuda::device(device);
  AttentionArguments a = arguments(call);
  a.out = const_cast<void*>(out);  // which the forward writes
  a.out_at = layout(out_strides, call.B, call.H, call.S);
  a.dout = dout;
  a.dout_at = layout(dout_strides, call.B, call.H, call.S);
  a.lse = lse;
  a.dlse = dlse;
  a.dq = dq;
  a.dq_at = layout(dq_strides, call.B, call.H, call.S);
  a.dk = dk;
  a.dk_at = layout(dk_strides, call.B, call.Hk, call.T);
  a.dv = dv;
  a.dv_at = layout(dv_strides, call.B, call.Hk, call.T);
  a.dsinks = dsinks;
  a.shift = shift;
  a.delta = delta;
  a.dq_sum = dq_sum;
  a.turns = turns;
  a.ordered = ordered;
  const Choice choice = choose(call, a, true, gpu);
  hold(a, choice.tile, true, gpu);
  const int width = padded(choice, a);
  const auto clear_keys = [&](void* x, const Layout& at, int columns) {
    clear_rest(call.dtype, x, nullptr, a.cu_k, at, a, a.kv_heads, a.total_k, columns, device, stream);
  };
  clear_keys(dk, a.dk_at, a.d);
  clear_keys(dv, a.dv_at, a.width_v);
  clear_rest(call.dtype, dq, nullptr, a.cu_q, a.dq_at, a, a.heads, a.total_q, a.d, device, stream);

  const AttentionPrepare before{a, sum_tiles(a) * choice.tile.m * width, 1 + sum_tiles(a)};
  const int64_t blocks = max(pairs(a) * ceil_div(a.total_q, SMALL_ROWS), 1);  // one at least: turns[0] is wanted
  prepare.launch(call.dtype, row_variant(a.width_v), {blocks, SMALL_THREADS, 1, SMALL_ROOM}, before, device, stream);
  if (choice.hopper) {
    launch_hopper_backward(call.dtype, a, device, stream);
  } else {
    find_ranges(a, choice.tile, true, found, device, stream);
    start(backward, call.dtype, choice, a, a.kv_heads, device, stream);
  }
  const AttentionFinish after{a, choice.tile.m, width, static_cast<int>(ceil_div(a.len_q, SMALL_ROWS))};
  (choice.hopper ? finish_hopper : finish)
      .launch(call.dtype, row_variant(a.d), {int64_t{a.batches} * a.heads * after.tiles, SMALL_THREADS}, after, device,
              stream);
}

void attention_bias(AttentionCall call, const void* dout, Strides dout_strides, float* shift, float* delta,
                    float* dbias, Strides sizes, int device, Stream stream) {
  AttentionArguments a = arguments(call);
  a.dout = dout;
  a.dout_at = layout(dout_strides, call.B, call.H, call.S);
  a.shift = shift;
  a.delta = delta;
  a.dbias = dbias;
  const Choice choice = choose_ampere(ampere_bias, a, cuda::device(device));
  const auto& [mask_batches, mask_heads, mask_rows, mask_keys] = sizes;
  const bool keys = mask_keys == call.T && (call.T != 1 || mask_rows == call.S), rows = mask_rows == call.S || !keys;
  const bool both = rows && keys;
  AttentionBias b{};
  b.tiles_m = rows ? static_cast<int>(ceil_div(call.S, choice.tile.m)) : 1;
  b.tiles_n = keys ? static_cast<int>(ceil_div(call.T, choice.tile.n)) : 1;
  b.kept_heads = both ? static_cast<int>(mask_heads) : a.heads;
  b.summed_batches = both ? static_cast<int>(call.B / mask_batches) : 1;
  b.summed_heads = both ? static_cast<int>(call.H / mask_heads) : 1;
  b.rows = rows;
  b.keys = keys;
  b.call = a;
  const int64_t outer = both ? mask_batches * mask_heads : call.B * call.H;
  const Grid grid{outer * b.tiles_m * b.tiles_n, 32 * choice.tile.warps, 1, choice.tile.shared};
  bias[choice.width].launch(call.dtype, choice.variant, grid, b, device, stream);
}

}  // namespace fastlm::cuda
