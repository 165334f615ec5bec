// Activations on float32 and their derivatives, for gelu.cu and glu.cu. ACCURATE is for float32 results (4e-7 of the
// result); without it errors stay below 1e-5 of the result, far below half an ulp of bfloat16 (2e-3) and float16.
#pragma once
#include "cuda/device.cuh"

namespace fastlm::cuda {

struct ValueSlope {
  float value, slope;
};

/// 1 / (1 + exp(-x)).
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(exp2_fast(-LOG2_E * x) + 1); }

/// x * Phi(x). Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + c a), for a = |x|: the form of Abramowitz and Stegun 7.1.26
/// with the polynomials of csrc/cpu/simd_math.h. The lower tail keeps its relative precision, which (1 + erf) / 2
/// loses.
template <bool ACCURATE>
__device__ __forceinline__ ValueSlope gelu(float x) {
  const float a = fabsf(x), e = exp2_fast(x * x * (-0.5f * LOG2_E));
  float t, p;
  if constexpr (ACCURATE) {
    t = reciprocal_fast(a * 0.26f + 1);
    p = t * 0.030504918f - 0.15282898f;
    p = p * t + 0.2514916f;
    p = p * t - 0.1509493f;
    p = p * t + 0.16094807f;
    p = p * t + 0.0510276f;
    p = p * t + 0.10303027f;
    p = p * t + 0.10301675f;
    p = p * t + 0.10375906f;
  } else {
    t = reciprocal_fast(a * 0.3f + 1);
    p = t * -0.0770976f + 0.21603753f;
    p = p * t - 0.016948514f;
    p = p * t + 0.14419657f;
    p = p * t + 0.11374189f;
    p = p * t + 0.120074235f;
  }
  const float tail = e * (p * t), cdf = x > 0 ? 1 - tail : tail;
  return {x * cdf, cdf + x * e * 0.3989422804014327f};
}

/// x * s, s = sigmoid(sqrt(8 / pi) * (x + 0.044715 x^3)).
__device__ __forceinline__ ValueSlope gelu_tanh(float x) {
  constexpr float LINEAR = 1.5957691216057308f, CUBIC = LINEAR * 0.044715f;
  const float square = x * x, s = reciprocal_fast(exp2_fast(x * (square * (-LOG2_E * CUBIC) - LOG2_E * LINEAR)) + 1);
  const float value = x * s;
  return {value, value * (1 - s) * (square * (3 * CUBIC) + LINEAR) + s};
}

__device__ __forceinline__ ValueSlope silu(float x) {
  const float s = sigmoid(x), value = x * s;
  return {value, s + value * (1 - s)};
}

/// What is not used of it costs nothing.
template <Activation ACTIVATION>
__device__ __forceinline__ ValueSlope activate(float x) {
  if constexpr (ACTIVATION == Activation::silu) return silu(x);
  if constexpr (ACTIVATION == Activation::gelu_tanh) return gelu_tanh(x);
  return gelu<Same<Scalar, float>::value>(x);
}

}  // namespace fastlm::cuda
