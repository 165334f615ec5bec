// The activations that gelu and glu share, on vectors. T is the element type of the result.
#pragma once
#include "simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

/// act(x) and, where SLOPE, d act / dx.
struct Activated {
  Vec value, slope;
};

/// x sigmoid(v(x)): silu for v = x, and the tanh form of gelu for v = 2 sqrt(2 / pi) (x + 0.044715 x^3), because
/// (1 + tanh(u)) / 2 = sigmoid(2 u).
template <class T, bool SLOPE>
FASTLM_INLINE Activated gate_by_sigmoid(Vec x, Vec v, Vec dv) {
  const Vec decay = exp_for_sigmoid<T>(v), s = reciprocal<T>(1.f + decay);
  const Vec y = x * s;
  Activated out{y, Vec{}};
  // 1 - s cancels where s is near 1, and gelu_tanh's x dv makes twenty times as much of what is lost.
  if constexpr (SLOPE) out.slope = s + y * (ACCURATE<T> ? (decay < 1.f ? decay * s : 1.f - s) : 1.f - s) * dv;
  return out;
}

template <class T>
struct Silu {
  template <bool SLOPE>
  FASTLM_INLINE static Activated at(Vec x) {
    return gate_by_sigmoid<T, SLOPE>(x, x, splat(1.f));
  }
};

template <class T>
struct GeluTanh {
  template <bool SLOPE>
  FASTLM_INLINE static Activated at(Vec x) {
    constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2 sqrt(2 / pi), and times 0.044715
    const Vec square = x * x;
    return gate_by_sigmoid<T, SLOPE>(x, x * (square * b + a), square * (3 * b) + a);
  }
};

/// With a = |x|: x Phi(x) = max(x, 0) - a Phi(-a), and the slope is D = Phi(-a) - a phi(a) for x <= 0, else 1 - D.
template <class T>
struct Gelu {
  template <bool SLOPE>
  FASTLM_INLINE static Activated at(Vec x) {
    const Vec a = vmin(splat(16.f), vabs(x));  // where Phi(-a) is 0 in float32; infinity would give 0 times infinity
    const NormalTail tail = normal_tail<T>(a);
    Activated out{vmax(Vec{}, x) - a * (tail.decay * tail.ratio), Vec{}};
    if constexpr (SLOPE) {
      const Vec d = tail.decay * (tail.ratio - a * 0.398942280f);
      out.slope = x > Vec{} ? 1.f - d : d;
    }
    return out;
  }
};

/// f(activation) for the type that an Activation names: the one switch.
template <class T, class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::silu:
      return f(Silu<T>{});
    case Activation::gelu:
      return f(Gelu<T>{});
    case Activation::gelu_tanh:
      return f(GeluTanh<T>{});
  }
}

/// Bytes that a large input is fetched ahead of its use: the processor looks ahead by eight vectors of this much
/// arithmetic, and its prefetcher starts anew at each page. Worth a quarter of gelu in float32, half in bfloat16.
constexpr int64_t AHEAD = 2048;

template <int INPUTS, int OUTPUTS, class T, class STREAM, class F>
FASTLM_INLINE void map_pair(const T* const (&in)[INPUTS], T* const (&out)[OUTPUTS], int64_t i, STREAM streamed, F f) {
  Vec a[INPUTS], b[INPUTS], y[OUTPUTS], z[OUTPUTS];
  for (int k = 0; k < INPUTS; ++k) {
    load_pair(in[k] + i, a[k], b[k]);
    if (STREAM::value)
      for (size_t line = 0; line < 2 * W * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(in[k] + i) + AHEAD + line);
  }
  f(a, y);
  f(b, z);
  for (int k = 0; k < OUTPUTS; ++k) store_pair(out[k] + i, y[k], z[k], streamed);
}

/// f(x, y) for every element of a row of n: x holds one vector of each of the inputs, y takes one of each of the
/// outputs. Two vectors at a time (load_pair), the rest of a row through a buffer as long, so that it is rounded alike.
template <int INPUTS, int OUTPUTS, class T, class STREAM, class F>
inline void map_row(const T* const (&in)[INPUTS], T* const (&out)[OUTPUTS], int64_t n, STREAM streamed, F f) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) map_pair(in, out, i, streamed, f);
  if (i == n) return;
  T values[INPUTS][2 * W], results[OUTPUTS][2 * W];
  const T* from[INPUTS];
  T* to[OUTPUTS];
  for (int k = 0; k < INPUTS; ++k) {
    std::memset(static_cast<void*>(values[k]), 0, sizeof values[k]);
    std::memcpy(static_cast<void*>(values[k]), in[k] + i, (n - i) * sizeof(T));
    from[k] = values[k];
  }
  for (int k = 0; k < OUTPUTS; ++k) to[k] = results[k];
  map_pair(from, to, 0, std::false_type{}, f);
  for (int k = 0; k < OUTPUTS; ++k) std::memcpy(static_cast<void*>(out[k] + i), results[k], (n - i) * sizeof(T));
}

/// Elements below which a second thread costs more than it saves.
constexpr int64_t ACTIVATION_GRAIN = 8192;

}  // namespace
}  // namespace fastlm::FASTLM_ISA
