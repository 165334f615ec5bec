// What every cross-entropy kernel computes from a row's logits: softcap, running maximum and sum of exponentials, and
// loss and gradient from the row's sums.
//
// The label's own logit is kept out of the running sum ("rest"): 1 - softmax(z)[t] = rest / (rest + exp(z[t] -
// largest)) then loses no digits where the row is nearly certain, and neither does the log of the sum. Online softmax:
// Milakov and Gimelshein 2018, arXiv:1805.02867.
#pragma once
#include "cuda/device.cuh"

namespace fastlm::cuda {

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

/// What to subtract from logits whose maximum so far is top: minus infinity less itself would be NaN.
__device__ __forceinline__ float finite_or_zero(float top) { return top == minus_infinity() ? 0 : top; }

/// z = softcap * tanh(x / softcap), or x for softcap 0.
__device__ __forceinline__ float capped(float x, float softcap) {
  return softcap > 0 ? softcap * tanh_fast(x / softcap) : x;
}

/// One running maximum and the sum of exp(z - top); under smoothing also the sum of w[c] * (z[c] - pivot).
struct LogSum {
  float top = minus_infinity(), sum = 0, pulled = 0;
};

/// The values combined in pairs: less rounding than one after the other, and less waiting.
template <int N, class Combine>
__device__ __forceinline__ float fold(const float (&values)[N], Combine combine) {
  if constexpr (N == 1) {
    return values[0];
  } else {
    float half[N / 2];
    FASTLM_UNROLL
    for (int i = 0; i < N / 2; ++i) half[i] = combine(values[i], values[i + N / 2]);
    return fold(half, combine);
  }
}
struct Larger {  // one instruction; a NaN is lost, and stays in the sum
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// Takes ROWS x N logits in, N a power of two: one exponential for each and one for all that came before.
template <int ROWS, int N>
__device__ __forceinline__ void add(LogSum& s, const float (&z)[ROWS][N]) {
  float top = s.top, part = 0;
  FASTLM_UNROLL
  for (int r = 0; r < ROWS; ++r) top = fmaxf(top, fold(z[r], Larger()));
  const float shift = finite_or_zero(top);
  FASTLM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    float e[N];
    FASTLM_UNROLL
    for (int i = 0; i < N; ++i) e[i] = exp2_fast((z[r][i] - shift) * LOG2_E);
    part += fold(e, Sum());
  }
  s.sum = s.sum * exp2_fast((s.top - shift) * LOG2_E) + part;
  s.top = top;
}

/// Over `group` neighbouring lanes, a power of two; every lane gets the result, and adds in the same order.
__device__ __forceinline__ void reduce(LogSum& s, int group, bool pulled) {
  float top = s.top;
  for (int lanes = group / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, lanes));
  s.sum *= exp2_fast((s.top - finite_or_zero(top)) * LOG2_E);
  s.top = top;
  for (int lanes = group / 2; lanes > 0; lanes /= 2) s.sum += __shfl_xor_sync(FULL, s.sum, lanes);
  if (!pulled) return;
  for (int lanes = group / 2; lanes > 0; lanes /= 2) s.pulled += __shfl_xor_sync(FULL, s.pulled, lanes);
}

struct RowLoss {
  float value, top, log_sum, rest_share;  // loss; largest z; log of the sum of exp(z - largest); 1 - softmax(z)[t]
};

struct LossOptions {
  float smoothing, share, z_loss;  // share: smoothing / V
  float whole;                     // sum_c w[c], under smoothing
};

/// From the sums of the logits but the label's (without any: minus infinity and 0), the label's, and the row's weight.
/// Under smoothing rest.pulled is sum_c w[c] * (z[c] - pivot) over all classes, pivot being own where that is finite.
__device__ __forceinline__ RowLoss row_loss(const LogSum& rest, float own, float weight, const LossOptions& o) {
  const float top = fmaxf(rest.top, own);
  const float others = rest.sum * exp2_fast((rest.top - top) * LOG2_E), e = exp2_fast((own - top) * LOG2_E);
  const float log_sum = log1pf(own >= rest.top ? others : (others - 1) + e);
  float value = weight * (1 - o.smoothing) * ((top - own) + log_sum);
  if (o.smoothing != 0) value += (o.whole * ((top - finite_or_zero(own)) + log_sum) - rest.pulled) * o.share;
  const float lse = top + log_sum;
  if (o.z_loss != 0) value += weight * lse * lse * o.z_loss;
  return {value, top, log_sum, others / (others + e)};
}

/// Factors of a row's gradient: dz[c] = push * p[c] - spread * w[c], and at the label
/// dz[t] = extra * p[t] - pull_rest - spread * w[t], where pull_rest is a multiple of 1 - p[t].
struct RowGradient {
  float top, log2_sum, push, extra, pull_rest, spread;
};

/// scale: what the row's gradient is multiplied by.
__device__ __forceinline__ RowGradient row_gradient(const RowLoss& row, float weight, float scale,
                                                    const LossOptions& o) {
  const float pull = weight * (1 - o.smoothing) * scale;
  float extra = pull * 0;  // NaN where the label is wrong
  if (o.smoothing != 0) extra += o.whole * o.share * scale;
  if (o.z_loss != 0) extra += weight * (row.top + row.log_sum) * (2 * o.z_loss) * scale;
  return {row.top, row.log_sum * LOG2_E, pull + extra, extra, pull * row.rest_share, scale * o.share};
}

__device__ __forceinline__ float softmax(float z, const RowGradient& g) {
  return exp2_fast((z - g.top) * LOG2_E - g.log2_sum);
}

}  // namespace fastlm::cuda
