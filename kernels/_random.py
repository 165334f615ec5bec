"""The random bits of dropout: a hash of (seed, row, column), so that a backward makes the forward's mask again.

The same numbers as csrc/cpu/attention.h, which documents them, and fastlm/reference/_random.py: per row a 64-bit key
(splitmix64), per element a 32-bit mix. Kernels take the seed as a pointer to one int64 and load it themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(dropout: float) -> int:
    """What kept() compares with: an element is dropped with this probability. Moved by 2^31, so that it is an int32."""
    return min(int(dropout * 2**32), 2**32 - 1) - 2**31


@triton.jit
def row_keys(seed, row):
    """The keys of rows (a tensor of integers, any shape) for a loaded seed: their low and high halves, uint32."""
    z = seed.to(tl.uint64) + (row.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def kept(low, high, column, threshold):
    """False where dropped. low, high: of row_keys(), column: a tensor of integers; they broadcast. threshold: ours."""
    u = low ^ (column.to(tl.uint32) * 0x9E3779B1)
    u = (u ^ (u >> 16)) * 0x7FEB352D
    u = ((u ^ (u >> 15)) + high) * 0x846CA68B
    return (u ^ (u >> 16) ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
