// The 8-bit code book of blocks of 256 numbers (Dettmers et al. 2021, arXiv:2110.02861). The book and what is nearest
// stand in fastlm/reference/adam.py. A code is a number n of a tree: with e the place of n's leading bit and f what
// follows it, its value is 10^(e - TOP) * (0.1 + 0.9 * (f + half a step)). Values are looked up, in a table that each
// block makes in shared memory; codes are worked out.
#pragma once
#include "cuda/device.cuh"

namespace fastlm::cuda {

/// The decade from 0.1 has 2^CODE_TOP values of either sign.
template <bool SIGNED>
constexpr int CODE_TOP = SIGNED ? 6 : 7;

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

/// The value of n >= 1, in float32 operations that round alike everywhere: all but two are exact.
template <bool SIGNED>
__device__ inline float code_value(int n) {
  const int bits = __float_as_int(static_cast<float>(2 * n + 1));
  const int e = (bits >> 23) - 128;
  const float inner = __int_as_float((bits & 0x7fffff) | 0x3f800000);  // 1 + f + half a step
  const float ten = (e & 1 ? 10.f : 1.f) * (e & 2 ? 100.f : 1.f) * (e & 4 ? 10000.f : 1.f);
  return multiply(multiply(fmaf(9.f, inner, -8.f), ten), SIGNED ? 1e-7f : 1e-8f);
}

/// uint8 to float32 in [-1, 1] if SIGNED, else in [0, 1].
template <bool SIGNED>
__device__ inline float decode(int code) {
  if constexpr (SIGNED) {
    const int n = code - 127, size = n < 0 ? -n : n;
    const float value = size == 0 ? 0.f : size == 128 ? 1.f : code_value<SIGNED>(size);
    return n < 0 ? -value : value;
  }
  return code == 0 ? 0.f : code == 255 ? 1.f : code_value<SIGNED>(code + 1);
}

/// The n whose value is nearest to x, 1e-7 <= x <= 1.
template <bool SIGNED>
__device__ __forceinline__ int code_number(float x) {
  constexpr int TOP = CODE_TOP<SIGNED>;
  int e = x < 1e-4f ? TOP - 4 : TOP;
  float y = x < 1e-4f ? x * 1e4f : x;
  if (y < 1e-2f) {
    e -= 2;
    y *= 1e2f;
  }
  if (y < 1e-1f) {
    e -= 1;
    y *= 1e1f;
  }
  const float steps = power_of_two(e);
  float place = fmaf(10.f, y, 8.f) * (0.11111111f * steps);
  // The last code of the decade below is 0.2 steps before this one's start, the code 1 half a step behind the last.
  if (place < steps + 0.2f) place = steps - 1.f;
  return place < (2 << TOP) - 0.25f ? static_cast<int>(place) : 2 << TOP;  // a NaN is some code too
}

/// float32 in the range of decode() to the nearest code; what is above zero without a sign never gives zero.
template <bool SIGNED>
__device__ __forceinline__ uint32_t encode(float x) {
  if constexpr (SIGNED) {
    const float size = fabsf(x);
    const int n = size < 2.75e-7f ? 0 : code_number<SIGNED>(size);
    return static_cast<uint32_t>(x < 0 ? 127 - (n < 127 ? n : 127) : 127 + n);
  }
  return static_cast<uint32_t>((x < 3e-7f ? (x > 0 ? 2 : 1) : code_number<SIGNED>(x)) - 1);
}

/// What numbers are multiplied by before they are encoded, for their block's largest magnitude. Whose inverse would
/// overflow counts as zero; the codes beside a scale that is not finite do not matter.
__device__ __forceinline__ float code_scale(float absmax) { return absmax >= 1.1754944e-38f ? 1.f / absmax : 0.f; }

}  // namespace fastlm::cuda
