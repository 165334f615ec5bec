"""Activations on float32 blocks, and their derivatives, for every kernel that needs them.

ACCURATE is for float32 results (4e-7 of the result); without it errors stay below 1e-5 of the result, far below half an
ulp of bfloat16 (2e-3) and float16 (2.4e-4), for three multiplications less. A tensor stands left of a constant: the
interpreter cannot multiply a constexpr by a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def normal_cdf(x, ACCURATE: tl.constexpr):
    """Phi(x) = (1 + erf(x / sqrt(2))) / 2, and exp(-x^2 / 2).

    Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + c a), for a = |x|: the form of Abramowitz and Stegun 7.1.26 with the
    polynomials of csrc/cpu/simd_math.h, of minimal relative error over [0, 14]. The lower tail keeps its relative
    precision, which (1 + erf) / 2 loses: 1 + erf(-4) has three digits left.
    """
    a = tl.abs(x)
    e = tl.exp2(x * x * MINUS_HALF_LOG2_E)
    if ACCURATE:
        t = 1.0 / (a * 0.26 + 1.0)
        p = t * 0.030504918 - 0.15282898
        p = p * t + 0.2514916
        p = p * t - 0.1509493
        p = p * t + 0.16094807
        p = p * t + 0.0510276
        p = p * t + 0.10303027
        p = p * t + 0.10301675
        p = p * t + 0.10375906
    else:
        t = 1.0 / (a * 0.3 + 1.0)
        p = t * -0.0770976 + 0.21603753
        p = p * t - 0.016948514
        p = p * t + 0.14419657
        p = p * t + 0.11374189
        p = p * t + 0.120074235
    tail = e * (p * t)
    return tl.where(x > 0, 1.0 - tail, tail), e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). tl.sigmoid keeps denormal exponentials, which costs three instructions and changes nothing."""
    return 1.0 / (tl.exp2(x * -LOG2_E) + 1.0)


@triton.jit
def gelu(x, TANH: tl.constexpr, ACCURATE: tl.constexpr):
    """x * Phi(x), and its derivative; the tanh form is x * sigmoid(sqrt(8 / pi) * (x + 0.044715 x^3))."""
    if TANH:
        s = sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)
        value = x * s
        slope = s + value * (1 - s) * SQRT_8_OVER_PI * (x * x * (3 * CUBIC) + 1)
    else:
        cdf, e = normal_cdf(x, ACCURATE)
        value = x * cdf
        slope = cdf + x * e * INV_SQRT_2PI
    return value, slope


@triton.jit
def silu(x):
    """x * sigmoid(x), and its derivative."""
    s = sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ACCURATE: tl.constexpr):
    """The activation "silu", "gelu" or "gelu_tanh" at x, and its derivative; what is not used costs nothing."""
    if ACTIVATION == "silu":
        value, slope = silu(x)
    else:
        value, slope = gelu(x, ACTIVATION == "gelu_tanh", ACCURATE)
    return value, slope


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """1 - 2 / (exp(2 x) + 1); near 0 that has lost its digits, and ACCURATE takes the series there."""
    t = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
    if ACCURATE:
        q = x * x
        series = x * (q * (q * (q * (q * 0.021869489 - 0.053968254) + 0.13333333) - 0.33333333) + 1.0)
        t = tl.where(q < 0.0625, series, t)
    return t
