"""Activations on float32 blocks, and their derivatives, for every kernel that needs them.

A tensor stands left of a constant: the interpreter cannot multiply a constexpr by a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x * Phi(x); the tanh form is x * sigmoid(sqrt(8 / pi) * (x + 0.044715 x^3))."""
    if TANH:
        return x * tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)
    return x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_slope(x, TANH: tl.constexpr):
    """The derivative of gelu."""
    if TANH:
        s = tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)
        return s + x * s * (1 - s) * SQRT_8_OVER_PI * (1 + x * x * (3 * CUBIC))
    return 0.5 + 0.5 * tl.erf(x * SQRT_HALF) + x * tl.exp(-0.5 * x * x) * INV_SQRT_2PI
