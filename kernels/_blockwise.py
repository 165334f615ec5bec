"""The 8-bit code book of blocks of 256 numbers (Dettmers et al. 2021, arXiv:2110.02861) inside Triton kernels.

The book and what is nearest stand in fastlm/reference/adam.py. Here both are computed: gathers from a table of 256
numbers cost a warp up to eight passes through the first-level cache each. A code is a number n of a tree: with e the
place of n's leading bit and f what follows it, 10^(e - TOP) * (0.1 + 0.9 * (f + half a step)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power_of_two(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _value(n, SIGNED: tl.constexpr):
    """The value of n >= 1, in float32 operations that round alike everywhere: all but two are exact."""
    bits = (2 * n + 1).to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits >> 23) - 128
    inner = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    ten = tl.where((e & 1) != 0, 10.0, 1.0) * tl.where((e & 2) != 0, 100.0, 1.0) * tl.where((e & 4) != 0, 10000.0, 1.0)
    return (9.0 * inner - 8.0) * ten * (1e-7 if SIGNED else 1e-8)


@triton.jit
def _number(x, SIGNED: tl.constexpr):
    """The n whose value is nearest to x, 1e-7 <= x <= 1."""
    TOP: tl.constexpr = 6 if SIGNED else 7  # the decade from 0.1 has 2^TOP values of either sign
    e = tl.where(x < 1e-4, TOP - 4, TOP)
    y = tl.where(x < 1e-4, x * 1e4, x)
    e = tl.where(y < 1e-2, e - 2, e)
    y = tl.where(y < 1e-2, y * 1e2, y)
    e = tl.where(y < 1e-1, e - 1, e)
    y = tl.where(y < 1e-1, y * 1e1, y)
    steps = _power_of_two(e)
    place = (10.0 * y + 8.0) * 0.11111111 * steps
    # The last code of the decade below is 0.2 steps before this one's start, the code 1 half a step behind the last.
    place = tl.where(place < steps + 0.2, steps - 1.0, place)
    return tl.where(place >= (2 << TOP) - 0.25, 2 << TOP, place.to(tl.int32))


@triton.jit
def decode(code, SIGNED: tl.constexpr):
    """uint8 to float32 in [-1, 1] if SIGNED, else in [0, 1]."""
    if SIGNED:
        n = code.to(tl.int32) - 127
        size = tl.maximum(tl.abs(n), 1)
        value = tl.where(size == 128, 1.0, _value(size, SIGNED))
        return tl.where(n == 0, 0.0, tl.where(n < 0, -value, value))
    else:
        n = code.to(tl.int32) + 1
        return tl.where(n == 1, 0.0, tl.where(n == 256, 1.0, _value(n, SIGNED)))


@triton.jit
def encode(x, SIGNED: tl.constexpr):
    """float32 in the range of decode() to the nearest code; what is above zero without a sign never gives zero."""
    if SIGNED:
        size = tl.abs(x)
        n = tl.where(size < 2.75e-7, 0, _number(size, SIGNED))
        return tl.where(x < 0, 127 - tl.minimum(n, 127), 127 + n).to(tl.uint8)
    else:
        n = tl.where(x < 3e-7, tl.where(x > 0, 2, 1), _number(x, SIGNED))
        return (n - 1).to(tl.uint8)


@triton.jit
def dequantize(codes, absmax, SIGNED: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes (BLOCKS * 256) and the largest magnitude of each block (BLOCKS) to float32 (BLOCKS * 256)."""
    values = tl.reshape(decode(codes, SIGNED), (BLOCKS, 256)) * absmax[:, None]
    return tl.reshape(values, (BLOCKS * 256,))


@triton.jit
def quantize(values, SIGNED: tl.constexpr, BLOCKS: tl.constexpr):
    """float32 (BLOCKS * 256) to codes (BLOCKS * 256) and the largest magnitude of each block (BLOCKS)."""
    values = tl.reshape(values, (BLOCKS, 256))
    # As integers: a NaN is above infinity there, where a maximum of floats would drop it.
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    # Whose inverse would overflow counts as zero; the codes beside a scale that is not finite do not matter.
    inverse = tl.where(absmax >= 1.1754944e-38, tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), absmax), 0.0)
    codes = encode(values * inverse[:, None], SIGNED)
    return tl.reshape(codes, (BLOCKS * 256,)), absmax
