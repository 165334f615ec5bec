// Functions of vectors that activations are made of. ACCURATE is for float32 results (a few ulp); without it errors
// stay below 1e-5 of the result, far below half an ulp of bfloat16 (2e-3) and float16 (2.4e-4), for fewer instructions.
//   reciprocal   1 / x, within about 1 ulp
//   sigmoid      1 / (1 + exp(-x))
//   tanh         within a few ulp for all results
//   normal_cdf   Phi(x) = (1 + erf(x / sqrt(2))) / 2 and, for derivatives, the density exp(-x^2 / 2) / sqrt(2 pi)
#pragma once
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// 1 / x, also for infinity and zero. The division instruction would take as long as all the rest of an activation.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps((__m512)x);
  // One Newton step; infinity and zero would turn into NaN in it, so they keep the estimate.
  const __m512 e = _mm512_fnmadd_ps((__m512)x, r, _mm512_set1_ps(1.f));
  return (Vec)_mm512_mask_fmadd_ps(r, _mm512_cmp_ps_mask(e, e, _CMP_EQ_OQ), e, r);
#else
  return 1.f / x;
#endif
}

inline Vec sigmoid(Vec x) { return reciprocal(1.f + exp(-x)); }

/// tanh: an odd polynomial near 0 (Cephes), 1 - 2 / (e^2u + 1) elsewhere.
inline Vec tanh(Vec u) {
  const Vec a = vabs(u), s = u * u;
  Vec p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Vec near = u + u * s * p;
  const Vec far = 1.f - 2.f / (exp(a + a) + 1.f);
  return a < 0.625f ? near : (u < 0.f ? -far : far);
}

/// Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + c a), for a = |x|: the form of Abramowitz and Stegun 7.1.26 with a
/// polynomial of minimal relative error over [0, 14], fitted for this file (2.5e-8, or 8e-6 with six coefficients).
/// The tail keeps its relative precision, which x * (1 + erf(x)) / 2 loses.
template <bool ACCURATE>
inline Vec normal_cdf(Vec x, Vec& density) {
  const Vec a = vabs(x);
  const Vec e = exp(x * x * -0.5f);
  density = e * 0.398942280f;
  Vec t, p;
  if constexpr (ACCURATE) {
    t = reciprocal(1.f + a * 0.26f);
    p = splat(0.030504918f);
    p = p * t - 0.15282898f;
    p = p * t + 0.2514916f;
    p = p * t - 0.1509493f;
    p = p * t + 0.16094807f;
    p = p * t + 0.0510276f;
    p = p * t + 0.10303027f;
    p = p * t + 0.10301675f;
    p = p * t + 0.10375906f;
  } else {
    t = reciprocal(1.f + a * 0.3f);
    p = splat(-0.0770976f);
    p = p * t + 0.21603753f;
    p = p * t - 0.016948514f;
    p = p * t + 0.14419657f;
    p = p * t + 0.11374189f;
    p = p * t + 0.120074235f;
  }
  const Vec tail = e * (p * t);
  return x > Vec{} ? 1.f - tail : tail;
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
