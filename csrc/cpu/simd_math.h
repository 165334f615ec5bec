// Functions of vectors that activations are made of. T is the element type of the result: for float errors are a few
// ulp, for bfloat16 and float16 below a twentieth of what rounding to them adds, for fewer instructions.
//   exp2         2^x for x <= 0, in AVX-512 any x
//   reciprocal   1 / x for x >= 1
//   exp_for_sigmoid  exp(-x), of which reciprocal(1 + .) makes the sigmoid
//   tanh         within a few ulp for all results
//   normal_tail  Phi(-a) for a >= 0, the standard normal distribution, and what its derivatives need
#pragma once
#include "simd.h"

// GCC takes these for too large and would call them, with all their constants loaded again for each vector.
#define FASTLM_INLINE __attribute__((always_inline)) inline

namespace fastlm::FASTLM_ISA {
namespace {

template <class T>
constexpr bool ACCURATE = sizeof(T) == 4;

/// 2^(x + rest) for x <= 0, in AVX-512 any x, or NaN: a polynomial in x - floor(x), within 2e-9 (before rounding) or
/// 3e-6, times 2^floor(x). Below 2^-126 it is 0 outside AVX-512. rest is what x lost by rounding: it is unused but for
/// float.
template <class T>
FASTLM_INLINE Vec exp2(Vec x, Vec rest) {
#if defined(__AVX512F__)
  Vec r = (Vec)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
#else
  const Vec shift = splat(0x1.8p23f);
  const Vec n = (x - 0.5f) + shift;  // floor(x) in the low bits; one less, and r = 1, for some integers
  Vec r = x - (n - shift);
#endif
  Vec p;
  if constexpr (ACCURATE<T>) {
    r += rest;
    p = splat(2.1612918e-4f);
    p = p * r + 1.2467846e-3f;
    p = p * r + 9.6754516e-3f;
    p = p * r + 5.5485282e-2f;
    p = p * r + 2.4022931e-1f;
    p = p * r + 6.9314706e-1f;
  } else {
    p = splat(1.3426687e-2f);
    p = p * r + 5.2242469e-2f;
    p = p * r + 2.4128021e-1f;
    p = p * r + 6.9304484e-1f;
  }
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const Vec y = from_bits(bits(p) + (bits(n) << 23));
  return x < -126.f ? Vec{} : y;
#endif
}

/// 1 / x for 1 <= x <= infinity. The division instruction would take as long as all the rest of an activation. The
/// estimate of 14 bits is enough for bfloat16; it is exact for 1, which activations of large numbers depend on.
template <class T>
FASTLM_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps((__m512)x);
  if constexpr (std::is_same<T, bfloat16>::value) return (Vec)r;
  // One Newton step; infinity would turn into NaN in it, so it keeps the estimate.
  const __m512 e = _mm512_fnmadd_ps((__m512)x, r, _mm512_set1_ps(1.f));
  return (Vec)_mm512_mask_fmadd_ps(r, _mm512_cmp_ps_mask(e, e, _CMP_EQ_OQ), e, r);
#else
  return 1.f / x;
#endif
}

/// exp(-x), what reciprocal(1 + .) makes the sigmoid of.
template <class T>
FASTLM_INLINE Vec exp_for_sigmoid(Vec x) {
#if defined(__AVX512F__)  // where exp2 reaches infinity
  if constexpr (!ACCURATE<T>) return exp2<T>(x * -1.44269504f, Vec{});
#endif
  return exp(-x);
}

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

/// Phi(-a) = exp(-a^2 / 2) * ratio for 0 <= a <= 16. ratio = t P(t), t = 1 / (1 + c a): the form of Abramowitz and
/// Stegun 7.1.26 with polynomials of minimal relative error over [0, 14] fitted for this file (1e-8; 1.2e-5 up to
/// a = 4.3, then growing to 1e-3). The tail keeps its relative precision, which (1 + erf(x)) / 2 loses.
struct NormalTail {
  Vec decay, ratio;  // exp(-a^2 / 2); what it is multiplied by
};
template <class T>
FASTLM_INLINE NormalTail normal_tail(Vec a) {
  Vec t, p;
  if constexpr (ACCURATE<T>) {
    t = reciprocal<T>(1.f + a * 0.26f);
    p = splat(0.0326409861f);
    p = p * t - 0.163268119f;
    p = p * t + 0.273208797f;
    p = p * t - 0.176010594f;
    p = p * t + 0.178450868f;
    p = p * t + 0.0434715971f;
    p = p * t + 0.104994103f;
    p = p * t + 0.102736548f;
    p = p * t + 0.103775814f;
  } else {
    t = reciprocal<T>(1.f + a * 0.36f);
    p = splat(-0.095453486f);
    p = p * t + 0.24476375f;
    p = p * t + 0.046742514f;
    p = p * t + 0.16198197f;
    p = p * t + 0.14196709f;
  }
  const Vec square = a * a;
  return {exp2<T>(square * -0.72134751f, square * -9.6298149e-9f), t * p};  // log2(e) / 2 in two parts
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
