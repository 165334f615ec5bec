// Every C++ entry point of fastlm, documented. Callers allocate everything and pass raw pointers, int64 sizes and
// strides (in elements), dtype values, and last the number of threads: torch's own, because the setting is per thread
// in OpenMP and would be lost in a new one. No entry checks its pointers; fastlm/native/ does before it asks for them.
//
// This header is read once per instruction set with FASTLM_ISA naming it, so that the same declarations stand in
// fastlm::generic, fastlm::avx2, fastlm::avx512 and fastlm::amx. To add a kernel: declare it here, add its name to
// FASTLM_KERNELS below, define it in csrc/cpu/<op>.cpp. bindings.cpp and dispatch.cpp need no change.
#pragma once
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"

#ifndef FASTLM_ISA
#define FASTLM_ISA generic
#endif

namespace fastlm {
/// Distances in elements between neighbours along each dimension of a 4-dimensional tensor; 0 where it is broadcast.
using Strides = std::array<int64_t, 4>;

/// cross_entropy works on this many logits of a row at a time.
constexpr int64_t cross_entropy_block = 2048;
/// Floats of scratch that cross_entropy_forward needs for each thread: a row, and a number for each of its blocks.
constexpr int64_t cross_entropy_room(int64_t V) { return (V + V / cross_entropy_block + 1 + 15) / 16 * 16; }

/// What few calls of attention ask for.
struct AttentionOptions {
  int64_t left;        // query i sees key j only where j >= i + offset - left
  float softcap;       // logits become softcap * tanh(logits / softcap); 0 for none
  const float* alibi;  // [H], alibi_batch apart for each batch: slopes times |i + offset - j| are subtracted; or null
  int64_t alibi_batch;
  const float* sinks;                     // [H], one more logit in the denominator; or null
  float* dsinks;                          // [H], their gradient; null in the forward
  const void *documents_q, *documents_k;  // [B, S] and [B, T], int64 (wide) or int32: a query sees keys of its number
  bool wide_documents;
  const int32_t *cu_seqlens_q,
      *cu_seqlens_k;                        // [sequences + 1]: B is 1, S and T are all rows of the sequences; or null
  int64_t sequences, longest_q, longest_k;  // the longest of them
};

}  // namespace fastlm

namespace fastlm::FASTLM_ISA {

// --- layer_norm, rms_norm -------------------------------------------------------------------------------------------
// Dimensions: M rows of N channels, last dimension contiguous; *_stride is the distance between rows in elements.

/// h = dropout(x) + residual (when residual is not null; h is stored in the dtype of x and then normalised as stored;
/// seed: one number, or null for no dropout), y = (h - mean) * rstd * weight + bias.
/// x, residual, h, y: [M, N] of `dtype`, h and y contiguous; weight, bias: [N] float32 or null; mean, rstd: [M]
/// float32.
void layer_norm_forward(DType dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                        const float* weight, const float* bias, const int64_t* seed, double dropout, void* h, void* y,
                        float* mean, float* rstd, int64_t M, int64_t N, float eps, int threads);

/// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh, where g = dy * weight and xhat = (x - mean) * rstd.
/// dh: [M, N] contiguous or null, the gradient of the residual stream. dweight, dbias: [N] float32 or null,
/// overwritten. With a seed that is the gradient of the residual, dresidual, and dx the same through dropout, else
/// dresidual is null. scratch: norm_scratch(M, N) floats. The order of summation depends on M and N only, never on
/// `threads`.
void layer_norm_backward(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                         const float* weight, const float* mean, const float* rstd, const void* dh, const int64_t* seed,
                         double dropout, void* dx, void* dresidual, float* dweight, float* dbias, float* scratch,
                         int64_t M, int64_t N, int threads);

/// y = h * rstd * (weight + offset), rstd = 1 / sqrt(mean(h^2) + eps); the rest as layer_norm_forward.
void rms_norm_forward(DType dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                      const float* weight, float offset, const int64_t* seed, double dropout, void* h, void* y,
                      float* rstd, int64_t M, int64_t N, float eps, int threads);

/// dx = rstd * (g - xhat * mean(g * xhat)) + dh, where g = dy * (weight + offset) and xhat = x * rstd.
void rms_norm_backward(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                       const float* weight, float offset, const float* rstd, const void* dh, const int64_t* seed,
                       double dropout, void* dx, void* dresidual, float* dweight, float* scratch, int64_t M, int64_t N,
                       int threads);

// --- dropout ---------------------------------------------------------------------------------------------------------

/// y = dropout(x) [+ residual], the backward too. x: M rows of N of x_dtype; residual (null for none): M rows of N of
/// `dtype`; y: [M, N] contiguous of `dtype`. seed: null where nothing is dropped, else as in layer_norm_forward.
void dropout(DType x_dtype, const void* x, int64_t x_stride, DType dtype, const void* residual, int64_t r_stride,
             const int64_t* seed, double p, void* y, int64_t M, int64_t N, int threads);

// --- gelu, glu, rope -------------------------------------------------------------------------------------------------

/// y = act(x) for n contiguous elements of `dtype`.
void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int threads);

/// dx = dy * act'(x).
void gelu_backward(DType dtype, Activation activation, const void* dy, const void* x, void* dx, int64_t n, int threads);

/// y = act(gate) * up. gate, up: M rows of N, last dimension contiguous; y: [M, N] contiguous.
void glu_forward(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up,
                 int64_t up_stride, void* y, int64_t M, int64_t N, int threads);

/// dgate = dy * up * act'(gate), dup = dy * act(gate); both with rows out_stride apart.
void glu_backward(DType dtype, Activation activation, const void* dy, int64_t dy_stride, const void* gate,
                  int64_t gate_stride, const void* up, int64_t up_stride, void* dgate, void* dup, int64_t out_stride,
                  int64_t M, int64_t N, int threads);

/// Rotates the leading R channels of every head: (a, b) -> (a cos - b sin, b cos + a sin), by the opposite angle when
/// `inverse`. Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. q: [B, Hq, S, D] with strides in elements for
/// batch, head and position; k likewise with Hk heads, or null; out of place.
/// cos, sin: [S, R/2] contiguous float32, table_batch apart for each batch (0: one table for all).
void rope(DType dtype, const void* q, int64_t q_batch, int64_t q_head, int64_t q_position, void* q_out,
          int64_t q_out_batch, int64_t q_out_head, int64_t q_out_position, int64_t Hq, const void* k, int64_t k_batch,
          int64_t k_head, int64_t k_position, void* k_out, int64_t k_out_batch, int64_t k_out_head,
          int64_t k_out_position, int64_t Hk, const float* cos, const float* sin, int64_t table_batch, int64_t B,
          int64_t S, int64_t D, int64_t R, bool interleaved, bool inverse, int threads);

// --- attention ------------------------------------------------------------------------------------------------------
// Dimensions: B batch, H heads, Hk key heads (H / Hk query heads read one), S queries, T keys, D and Dv head dims <=
// 256.

/// out = softmax(scale * q k^T + mask) v, lse = log of the softmax's denominator; rows that see no key give 0 and -inf.
/// q: [B, H, S, D], k: [B, Hk, T, D], v: [B, Hk, T, Dv], out: [B, H, S, Dv] of `dtype`, any strides but 1 in the last
/// dimension. mask: null or [B, H, S, T] with any strides; mask_type: the value of a dtype for a bias that is added, 3
/// for bool (true: attend), -1 for none. Query i sees key j only where j <= i + offset + right; offset is T - S where
/// bottom_right, else 0. seed: one number, read where dropout > 0. lse: [B, H, S] float32 contiguous. scratch: threads
/// * attention_forward_scratch(D, Dv) floats.
void attention_forward(DType dtype, const void* q, Strides q_strides, const void* k, Strides k_strides, const void* v,
                       Strides v_strides, const void* mask, int32_t mask_type, Strides mask_strides,
                       const int64_t* seed, void* out, Strides out_strides, float* lse, float* scratch, int64_t B,
                       int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D, int64_t Dv, bool bottom_right,
                       int64_t right, AttentionOptions options, float scale, double dropout, int threads);

/// Gradients of out (dout) and lse (dlse, float32 contiguous or null) to dq, dk, dv (dk, dv summed over the query heads
/// in float32) and, unless null, dbias: float32, with bias_strides over [B, H, S, T] and 0 where the bias is broadcast,
/// zeroed by the caller. scratch: attention_scratch(...) floats.
void attention_backward(DType dtype, const void* q, Strides q_strides, const void* k, Strides k_strides, const void* v,
                        Strides v_strides, const void* mask, int32_t mask_type, Strides mask_strides,
                        const int64_t* seed, const void* out, Strides out_strides, const void* dout,
                        Strides dout_strides, const float* lse, const float* dlse, void* dq, Strides dq_strides,
                        void* dk, Strides dk_strides, void* dv, Strides dv_strides, float* dbias, Strides bias_strides,
                        float* scratch, int64_t B, int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D, int64_t Dv,
                        bool bottom_right, int64_t right, AttentionOptions options, float scale, double dropout,
                        int threads);

// --- adam -----------------------------------------------------------------------------------------------------------

/// *result = sum of the squares of all elements of `count` gradients. grads: their addresses; sizes: their elements.
void adam_norm(DType dtype, const int64_t* grads, const int64_t* sizes, int64_t count, double* result, int threads);

/// One step of Adam on `count` parameters of `dtype`; decay is decoupled (AdamW) or added to the gradient.
/// table: [11, count]: elements; then addresses of the step (float32, incremented here), the parameter, exp_avg,
/// exp_avg_sq, max_exp_avg_sq or 0, master copy or 0 (all float32 but the parameter and, where moment_dtype says so,
/// beside bfloat16 parameters alone, bfloat16 moments); the seed of stochastic rounding; addresses of the largest
/// magnitudes of 8-bit exp_avg and exp_avg_sq or 0, of a shadow of shadow_dtype (of a float32 parameter) or 0. A row of
/// addresses is 0 for all tensors or for none. grads: addresses, of `dtype` or float32; each is multiplied by
/// grad_scale (negative to maximise).
void adam_step(DType dtype, DType grad_dtype, DType moment_dtype, DType shadow_dtype, const int64_t* table,
               const int64_t* grads, int64_t count, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled, double grad_scale, bool stochastic, int threads);

// --- cross_entropy --------------------------------------------------------------------------------------------------
// M rows of V logits, last dimension contiguous; *_stride is the distance between rows in elements. The formula stands
// in fastlm/ops/cross_entropy.py. target: [M]; weight: [V] or null; softcap 0 means none.

/// Checks the labels before anything is written. *wrong_row: the first row whose label is neither ignore_index nor in
/// [0, V), or -1. *total: the sum of weight[target] (1 without weights) over the rows that count.
void cross_entropy_labels(const int64_t* target, const float* weight, int64_t ignore_index, double* total,
                          int64_t* wrong_row, int64_t M, int64_t V, int threads);

/// loss: [M], *loss_sum += their sum, stats: [3, M] (rows stats_stride apart): largest z, log of the sum of
/// exp(z - largest), 1 - softmax(z)[target]. dlogits: scale * gradient of each row's loss, or null; may be the logits
/// themselves. scratch: threads * cross_entropy_room(V) floats. The labels must have been checked.
void cross_entropy_forward(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                           int64_t ignore_index, float label_smoothing, float z_loss, float softcap, double scale,
                           float* loss, double* loss_sum, float* stats, int64_t stats_stride, void* dlogits,
                           int64_t dlogits_stride, float* scratch, int64_t M, int64_t V, int threads);

/// The forward over `count` classes of each row from class `first` on, without a gradient: a row is read slice by
/// slice, first to last, and the last writes loss, *loss_sum += their sum, and stats. logits: [M, count]; weight: all
/// of [V]; state: [M, 5], kept from call to call.
void cross_entropy_slice(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                         int64_t ignore_index, float label_smoothing, float z_loss, float softcap, double* state,
                         float* loss, double* loss_sum, float* stats, int64_t stats_stride, int64_t M, int64_t first,
                         int64_t count, int64_t V, int threads);

/// dlogits = scale * dy[row] * gradient of the row's loss, for `count` of the V classes from class `first` on; may be
/// the logits themselves. dy: float32, dy_stride may be 0. stats as the forward left them. transposed: [count, M], the
/// same once more for the products that want it so, or null.
void cross_entropy_backward(DType dtype, const void* logits, int64_t stride, const int64_t* target, const float* weight,
                            int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                            const float* stats, int64_t stats_stride, const float* dy, int64_t dy_stride, double scale,
                            void* dlogits, int64_t dlogits_stride, void* transposed, int64_t transposed_stride,
                            int64_t M, int64_t first, int64_t count, int64_t V, int threads);

// --- linear ----------------------------------------------------------------------------------------------------------

/// dweight = dy^T x and dbias = the sum of dy's rows, summed in float32. dy: [M, N], x: [M, K] of `dtype`, bfloat16 or
/// float16, rows *_stride apart; dweight: [N, K] contiguous, float32 or (out_dtype) of `dtype`; dbias: [N] float32 or
/// null. scratch: threads * linear_room(N, K) + 64 bytes. M, N and K are at least 1.
void linear_weight_gradient(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                            DType out_dtype, void* dweight, float* dbias, void* scratch, int64_t M, int64_t N,
                            int64_t K, int threads);

}  // namespace fastlm::FASTLM_ISA

namespace fastlm {

// X(name, highest instruction set it has a variant for)
#define FASTLM_KERNELS(X)           \
  X(adam_norm, avx512)              \
  X(adam_step, avx512)              \
  X(layer_norm_forward, avx512)     \
  X(layer_norm_backward, avx512)    \
  X(rms_norm_forward, avx512)       \
  X(rms_norm_backward, avx512)      \
  X(dropout, avx512)                \
  X(gelu_forward, avx512)           \
  X(gelu_backward, avx512)          \
  X(glu_forward, avx512)            \
  X(glu_backward, avx512)           \
  X(rope, avx512)                   \
  X(attention_forward, amx)         \
  X(attention_backward, amx)        \
  X(cross_entropy_labels, avx512)   \
  X(cross_entropy_forward, avx512)  \
  X(cross_entropy_slice, avx512)    \
  X(cross_entropy_backward, avx512) \
  X(linear_weight_gradient, amx)

/// One pointer per entry point: the kernels of one instruction set.
struct Kernels {
#define X(name, top) decltype(&FASTLM_ISA::name) name;
  FASTLM_KERNELS(X)
#undef X
};

/// Kernels of the instruction set in use: the best one of this processor, unless set_isa() chose another.
const Kernels& kernels();
/// Instruction sets this build has and this processor can run, lowest first.
std::vector<std::string> isas();
/// Instruction sets this build has, whether or not this processor can run them.
std::vector<std::string> built_isas();
std::string isa();
/// Test hook. Throws std::invalid_argument for a name isas() does not list.
void set_isa(const std::string& name);

/// Rows are summed into this many partial sums of dweight and dbias, whatever the number of threads.
inline int64_t norm_parts(int64_t M) { return M < 64 ? 1 : M < 1024 ? 8 : 32; }
/// Floats of scratch that layer_norm_backward and rms_norm_backward need.
inline int64_t norm_scratch(int64_t M, int64_t N) { return 2 * norm_parts(M) * N; }

constexpr int64_t LINEAR_BLOCK = 512;  // rows and columns of dweight that are summed in the second-level cache
constexpr int64_t LINEAR_ROWS = 256;   // rows of dy and x that are packed beside them
/// Bytes of scratch per thread.
inline int64_t linear_room(int64_t N, int64_t K) {
  const int64_t n = (N < LINEAR_BLOCK ? N + 31 : LINEAR_BLOCK) / 32 * 32;
  const int64_t k = (K < LINEAR_BLOCK ? K + 31 : LINEAR_BLOCK) / 32 * 32;
  const int64_t tiles = (2 * LINEAR_ROWS + 32) * (n + k) + 4 * n * k + 4 * n, vectors = 148 << 10;
  return tiles > vectors ? tiles : vectors;
}

constexpr int64_t ATTENTION_TILE = 64;                   // queries and keys of a tile
constexpr int64_t ATTENTION_CHUNK = 8 * ATTENTION_TILE;  // queries that share the packing of keys in the forward
constexpr int64_t ATTENTION_FEW = 2;                     // queries of a head up to which the forward goes another way,
constexpr int64_t ATTENTION_DECODE_ROWS = 8;             // in which so many queries share the reading of keys
constexpr int64_t ATTENTION_DECODE_PARTS = 16;           // and keys are split among up to so many items
constexpr int64_t ATTENTION_KEYS = 8 * ATTENTION_TILE;   // keys that the AMX forward keeps packed
constexpr int64_t ATTENTION_GROUP = 4;                   // tiles of queries that the AMX backward takes at a time
constexpr int64_t ATTENTION_SPAN = 128;                  // keys between its additions to dQ
constexpr int64_t ATTENTION_HELD = 1024;                 // keys that it holds in the cache at most
/// Floats of scratch per thread in the forward.
inline int64_t attention_forward_share(int64_t S, int64_t D, int64_t Dv) {
  if (S <= ATTENTION_FEW) return 2 * ATTENTION_DECODE_ROWS * (D + Dv + 64) + 3 * ATTENTION_TILE * ATTENTION_TILE;
  return (ATTENTION_CHUNK + ATTENTION_KEYS / 2 + ATTENTION_TILE) * (D + Dv + 66) + 6 * ATTENTION_TILE * ATTENTION_TILE;
}
/// Floats of scratch that attention_forward needs.
inline int64_t attention_forward_scratch(int64_t S, int64_t D, int64_t Dv, int threads) {
  return threads * attention_forward_share(S, D, Dv) + ATTENTION_DECODE_PARTS * ATTENTION_DECODE_ROWS * (Dv + 18);
}
/// The longest of packed sequences, as far as they lie within `total` rows.
inline int64_t attention_longest(const int32_t* cu_seqlens, int64_t sequences, int64_t total) {
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences; ++n) {
    const int64_t first = cu_seqlens[n] > 0 ? cu_seqlens[n] : 0;
    const int64_t end = cu_seqlens[n + 1] < total ? cu_seqlens[n + 1] : total;
    if (end - first > longest) longest = end - first;
  }
  return longest;
}
/// Among how many items the queries of one key head are shared in the backward, whatever the number of threads.
inline int64_t attention_splits(int64_t B, int64_t H, int64_t Hk, int64_t S) {
  const int64_t heads = B * Hk, pairs = H / Hk * ((S + 2 * ATTENTION_TILE - 1) / (2 * ATTENTION_TILE));
  const int64_t wanted = heads >= 8 || pairs < 2 || heads == 0 ? 1 : (16 + heads - 1) / heads;
  return wanted < pairs || pairs < 2 ? wanted : pairs;
}
/// Keys that the AMX form of the backward keeps in the second-level cache, with the sums of their gradients: a multiple
/// of ATTENTION_SPAN. (static: what is not inlined would be a weak symbol.)
static inline int64_t attention_backward_keys(int64_t D, int64_t Dv) {
  const int64_t keys = (1 << 17) / (D + Dv) / ATTENTION_SPAN * ATTENTION_SPAN;
  return keys > ATTENTION_HELD ? ATTENTION_HELD : keys < ATTENTION_SPAN ? ATTENTION_SPAN : keys;
}
/// Floats of scratch per thread in the backward.
static inline int64_t attention_backward_scratch(int64_t B, int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D,
                                                 int64_t Dv) {
  const int64_t tiles = Hk ? H / Hk * ((S + ATTENTION_TILE - 1) / ATTENTION_TILE) : 0;
  const int64_t splits = attention_splits(B, H, Hk, S), whole = T <= attention_backward_keys(D, Dv);
  const int64_t kept = whole ? ATTENTION_GROUP : tiles / splits + 1;  // tiles of queries whose dQ is kept
  return (2 * (T + ATTENTION_SPAN) + ATTENTION_TILE * (kept + 6)) * (D + Dv + 64) +
         11 * ATTENTION_TILE * ATTENTION_TILE;
}
/// Floats of scratch that attention_backward needs.
static inline int64_t attention_scratch(int64_t B, int64_t H, int64_t Hk, int64_t S, int64_t T, int64_t D, int64_t Dv,
                                        int threads) {
  const int64_t splits = attention_splits(B, H, Hk, S);
  const int64_t partials = splits > 1 ? B * Hk * splits * (T + ATTENTION_TILE) * (D + Dv + 62) : 0;
  return threads * attention_backward_scratch(B, H, Hk, S, T, D, Dv) + partials + 64;
}

}  // namespace fastlm

// --- fastlm::cuda ---------------------------------------------------------------------------------------------------
// The launchers of csrc/cuda, in the module fastlm._cuda. The same ops: pointers to memory of one GPU, sizes and
// strides in elements, dtype values, last the GPU's index and the stream. They start kernels and return; nothing waits.
// To add one: declare it here, add its name to FASTLM_CUDA_KERNELS, define it in csrc/cuda/<op>.cpp, its kernels in
// <op>.cu.
namespace fastlm::cuda {

// --- gelu

/// y = act(x) for n contiguous elements of `dtype`; act: gelu or gelu_tanh.
void gelu_forward(DType dtype, Activation activation, const void* x, void* y, int64_t n, int device, Stream stream);

/// dx = dy * act'(x).
void gelu_backward(DType dtype, Activation activation, const void* dy, const void* x, void* dx, int64_t n, int device,
                   Stream stream);

// --- glu

/// y = act(gate) * up. gate, up: M rows of N, last dimension contiguous, rows *_stride apart; y: [M, N] contiguous.
void glu_forward(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up,
                 int64_t up_stride, void* y, int64_t M, int64_t N, int device, Stream stream);

/// dgate = dy * up * act'(gate), dup = dy * act(gate); both with rows out_stride apart.
void glu_backward(DType dtype, Activation activation, const void* dy, int64_t dy_stride, const void* gate,
                  int64_t gate_stride, const void* up, int64_t up_stride, void* dgate, void* dup, int64_t out_stride,
                  int64_t M, int64_t N, int device, Stream stream);

// --- embedding

/// y[i] = weight[ids[i]] for M ids, int64 (wide_ids) or int32; NaN where an id is not in [0, V). weight: [V, N], rows
/// weight_stride apart; y: [M, N] contiguous.
void embedding_forward(DType dtype, bool wide_ids, const void* ids, const void* weight, int64_t weight_stride, void* y,
                       int64_t M, int64_t V, int64_t N, int device, Stream stream);

/// starts[v] = how many of the M ascending keys are below v, for v = 0 .. V; keys: int64 (wide_keys) or int32.
void embedding_starts(bool wide_keys, const void* keys, int64_t* starts, int64_t M, int64_t V, int device,
                      Stream stream);

/// dweight[v] = the sum of dy[order[p]] over starts[v] <= p < starts[v + 1] in float32, 0 for v = padding_idx (-1 for
/// none). dy: [M, N], rows dy_stride apart; keys as above, order: their places in ids; partial: M / 128 rows of N
/// floats, N rounded up to whole 16 bytes of `dtype`; dweight: [V, N] contiguous.
void embedding_backward(DType dtype, const void* dy, int64_t dy_stride, bool wide_keys, const void* keys,
                        const int64_t* order, const int64_t* starts, float* partial, void* dweight, int64_t M,
                        int64_t V, int64_t N, int64_t padding_idx, int device, Stream stream);

// --- softmax

/// y = softmax(x) over each of M rows of N, or its logarithm. x: rows x_stride apart, y contiguous.
void softmax_forward(DType dtype, bool log, const void* x, int64_t x_stride, void* y, int64_t M, int64_t N, int device,
                     Stream stream);

/// dx = y * (dy - sum(y * dy)); of the logarithm dx = dy - exp(y) * sum(dy). dy: rows dy_stride apart.
void softmax_backward(DType dtype, bool log, const void* dy, int64_t dy_stride, const void* y, void* dx, int64_t M,
                      int64_t N, int device, Stream stream);

// --- rope

/// Rotates the leading R channels of every head: (a, b) -> (a cos - b sin, b cos + a sin), by the opposite angle when
/// `inverse`; channels from R on are copied. Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. q: [B, Hq, S, D]
/// with strides in elements for batch, head and position; q_out: contiguous as [B, Hq, S, D], or as [B, S, Hq, D] when
/// q_by_position; k likewise with Hk heads, or null; out of place. cos, sin: [B, S, R/2] of `table` with strides for
/// batch (0: one table for all) and position, the last dimension contiguous.
void rope(DType dtype, const void* q, int64_t q_batch, int64_t q_head, int64_t q_position, void* q_out,
          bool q_by_position, int64_t Hq, const void* k, int64_t k_batch, int64_t k_head, int64_t k_position,
          void* k_out, bool k_by_position, int64_t Hk, DType table, const void* cos, const void* sin,
          int64_t table_batch, int64_t table_position, int64_t B, int64_t S, int64_t D, int64_t R, bool interleaved,
          bool inverse, int device, Stream stream);

// --- adam

/// *result = sum of the squares of all elements of `count` gradients. grads: their addresses; sizes: their elements,
/// both in memory of the host; parts: a number for each 16384 elements of a gradient or part of them, scratch.
void adam_norm(DType dtype, const int64_t* grads, const int64_t* sizes, int64_t count, double* parts, double* result,
               int device, Stream stream);

/// One step of Adam on `count` parameters of `dtype`; decay is decoupled (AdamW) or added to the gradient.
/// table: [11, count] in memory of the host: elements; then addresses of the step (float32, incremented here), the
/// parameter, exp_avg, exp_avg_sq, max_exp_avg_sq or 0, master copy or 0 (all float32 but the parameter); the seed of
/// stochastic rounding; addresses of the largest magnitudes of 8-bit exp_avg and exp_avg_sq or 0, of a shadow of
/// shadow_dtype or 0. A row of addresses is 0 for all tensors or for none. grads: addresses, of `dtype` or float32.
/// lr, grad_scale, found_inf: where they are on the device, float32 or double, or null (for lr: the number). scalars:
/// 32 * count bytes of scratch.
void adam_step(DType dtype, DType grad_dtype, DType shadow_dtype, const int64_t* table, const int64_t* grads,
               int64_t count, void* scalars, double lr, const void* lr_at, bool lr_is_double, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool maximize, const void* grad_scale,
               bool grad_scale_is_double, const void* found_inf, bool found_inf_is_double, bool stochastic, int device,
               Stream stream);

// --- layer_norm, rms_norm

/// As layer_norm_forward and rms_norm_forward above: y = (h - mean) * rstd * (weight + offset) + bias; rms_norm is the
/// case without a mean (null). weight, bias: [N] of their own dtypes, or null. residual, seed: or null; h: with a
/// residual.
void norm_forward(DType dtype, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                  const void* weight, DType weight_dtype, float offset, const void* bias, DType bias_dtype,
                  const int64_t* seed, double dropout, void* h, void* y, float* mean, float* rstd, int64_t M, int64_t N,
                  float eps, int device, Stream stream);

/// How many parts of [N] float32 the next function needs room for, for each of dweight and dbias. A function of the
/// arguments alone.
int64_t norm_parts(DType dtype, int64_t M, int64_t N, int device);

/// As layer_norm_backward and rms_norm_backward above. dweight, dbias: [N] of weight_dtype, or null; parts: for those
/// of them that are not null, norm_parts(...) * N floats each. The order of summation depends on the shapes, the dtype
/// and the GPU.
void norm_backward(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* weight,
                   DType weight_dtype, float offset, const float* mean, const float* rstd, const void* dh,
                   const int64_t* seed, double dropout, void* dx, void* dresidual, void* dweight, void* dbias,
                   float* parts, int64_t M, int64_t N, int device, Stream stream);

// --- cross_entropy
// M rows of V logits, last dimension contiguous; the formula stands in fastlm/ops/cross_entropy.py. weight: [V] of
// weight_dtype or null; softcap 0 means none. A target outside [0, V) that is not ignore_index makes the loss and the
// gradient of its row NaN, and all that a mean divides; nothing is read out of bounds.

/// Floats of scratch, behind which a reduced forward needs M more. It may be null where nothing is reduced, averaged
/// or smoothed under weights.
constexpr int64_t cross_entropy_scratch = 257;

/// loss: [M] float32, or one number where `reduced`: their sum, under `mean` over the sum of the rows' weights. stats:
/// [3, M] float32: largest z, log of the sum of exp(z - largest), 1 - softmax(z)[target]. dlogits: the gradient, or
/// null; may be the logits themselves.
void cross_entropy_forward(DType dtype, const void* logits, int64_t stride, const int64_t* target,
                           int64_t target_stride, const void* weight, DType weight_dtype, int64_t ignore_index,
                           bool mean, bool reduced, float label_smoothing, float z_loss, float softcap, float* loss,
                           float* stats, void* dlogits, int64_t dlogits_stride, float* scratch, int64_t M, int64_t V,
                           int device, Stream stream);

/// dlogits = dy[row] * gradient of the row's loss, under `mean` over the sum of the rows' weights; may be the logits
/// themselves. dy: float32, dy_stride may be 0. stats as the forward left them.
void cross_entropy_backward(DType dtype, const float* dy, int64_t dy_stride, const void* logits, int64_t stride,
                            const int64_t* target, int64_t target_stride, const void* weight, DType weight_dtype,
                            int64_t ignore_index, bool mean, float label_smoothing, float z_loss, float softcap,
                            const float* stats, void* dlogits, int64_t dlogits_stride, float* scratch, int64_t M,
                            int64_t V, int device, Stream stream);

/// x *= *factor for n contiguous elements, which are not touched where it is 1.
void cross_entropy_scale(DType dtype, void* x, const float* factor, int64_t n, int device, Stream stream);

// --- attention

/// A call, as attention_forward and attention_backward above take it but for: q, k and v have 16 bits, addresses and
/// distances that are multiples of 16 bytes, D and Dv that are multiples of 8; mask: that or float32 or bool;
/// documents: int64; longest_q and longest_k: or more. hopper: false for mma.sync on a GPU that has wgmma too.
struct AttentionCall {
  DType dtype;
  const void* q;
  Strides q_strides;
  const void* k;
  Strides k_strides;
  const void* v;
  Strides v_strides;
  const void* mask;
  int32_t mask_type;
  Strides mask_strides;
  const int64_t* seed;
  int64_t B, H, Hk, S, T, D, Dv;
  bool bottom_right;
  int64_t right;
  AttentionOptions options;
  float scale;
  double dropout;
  bool hopper;
};

/// What a call comes to: the path, "ampere" or "hopper"; queries and keys of a tile; then what it needs, numbers of:
/// ranges (int32), and of a backward dq_sum (float32), turns (int32), parts of dsinks (float32, H rows a batch).
/// strides: those of out or, in the backward, of dout.
using AttentionPlan = std::tuple<std::string, int, int, int64_t, int64_t, int64_t, int64_t>;
AttentionPlan attention_plan(AttentionCall call, bool backward, Strides strides, int device);

void attention_forward(AttentionCall call, void* out, Strides out_strides, float* lse, int* ranges, int device,
                       Stream stream);

/// `ordered`: blocks add to dq_sum in turn, so that every run gives the same bits. shift, delta: [B, H, S] of scratch.
/// dsinks: parts of their sum.
void attention_backward(AttentionCall call, const void* out, Strides out_strides, const void* dout,
                        Strides dout_strides, float* lse, const float* dlse, void* dq, Strides dq_strides, void* dk,
                        Strides dk_strides, void* dv, Strides dv_strides, float* dsinks, float* shift, float* delta,
                        float* dq_sum, int* turns, int* ranges, bool ordered, int device, Stream stream);

/// The gradient of the mask, after attention_backward, which left shift and delta. Its shape is mask_sizes where that
/// has queries and keys; else [B, H, T], or where the mask has no keys [B, H, S], to be summed.
void attention_bias(AttentionCall call, const void* dout, Strides dout_strides, float* shift, float* delta,
                    float* dbias, Strides mask_sizes, int device, Stream stream);

#define FASTLM_CUDA_KERNELS(X) \
  X(gelu_forward)              \
  X(gelu_backward)             \
  X(glu_forward)               \
  X(glu_backward)              \
  X(embedding_forward)         \
  X(embedding_starts)          \
  X(embedding_backward)        \
  X(softmax_forward)           \
  X(softmax_backward)          \
  X(rope)                      \
  X(adam_norm)                 \
  X(adam_step)                 \
  X(norm_forward)              \
  X(norm_parts)                \
  X(norm_backward)             \
  X(cross_entropy_forward)     \
  X(cross_entropy_backward)    \
  X(cross_entropy_scale)       \
  X(attention_plan)            \
  X(attention_forward)         \
  X(attention_backward)        \
  X(attention_bias)

}  // namespace fastlm::cuda
