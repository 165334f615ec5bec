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
template <bool SLOPE>
inline Activated gate_by_sigmoid(Vec x, Vec v, Vec dv) {
  const Vec s = sigmoid(v);
  const Vec y = x * s;
  Activated out{y, Vec{}};
  if constexpr (SLOPE) out.slope = s + y * (1.f - s) * dv;
  return out;
}

template <class T>
struct Silu {
  template <bool SLOPE>
  static Activated at(Vec x) {
    return gate_by_sigmoid<SLOPE>(x, x, splat(1.f));
  }
};

template <class T>
struct GeluTanh {
  template <bool SLOPE>
  static Activated at(Vec x) {
    constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2 sqrt(2 / pi), and times 0.044715
    const Vec square = x * x;
    return gate_by_sigmoid<SLOPE>(x, x * (square * b + a), square * (3 * b) + a);
  }
};

template <class T>
struct Gelu {
  template <bool SLOPE>
  static Activated at(Vec x) {
    Vec density;
    const Vec cdf = normal_cdf<std::is_same<T, float>::value>(x, density);
    Activated out{x * cdf, Vec{}};
    if constexpr (SLOPE) out.slope = cdf + x * density;
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

/// Elements below which a second thread costs more than it saves.
constexpr int64_t ACTIVATION_GRAIN = 8192;

}  // namespace
}  // namespace fastlm::FASTLM_ISA
