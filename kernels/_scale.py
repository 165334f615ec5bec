"""A gradient that was made for an upstream gradient of 1 times the real one, which is nearly always 1.

The host does not know it, and must not wait to see: a few programs look, and only if it is another number do they walk
over the gradient, each over every so-manyth block. Reads 4 bytes, or reads and writes the gradient once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._launch import cdiv, launch, target

BLOCK, WARPS, PROGRAMS = 2048, 8, 8
"""PROGRAMS an SM fill it with 64 warps, each thread with 16 bytes of a half type under way."""


@triton.jit
def _scale(x, factor, size, programs, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:  # NaN too
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), programs):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(x + at, value * by, mask=at < size)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a tensor of one element."""
    if not gradient.is_contiguous():
        gradient.mul_(factor)
        return
    size = gradient.numel()
    programs = min(cdiv(size, BLOCK), PROGRAMS * target(gradient).sms)
    launch(_scale, (programs,), gradient, factor, size, programs, BLOCK=BLOCK, num_warps=WARPS)
