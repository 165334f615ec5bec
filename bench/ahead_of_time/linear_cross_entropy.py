from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.ahead_of_time import Case, meta
from fastlm.kernels import linear_cross_entropy

BF16, F32 = torch.bfloat16, torch.float32
NARROW = {"_forward": 80, "_dhidden": 80, "_dweight": 160, "_total": None, "_join": None, "_factors": None}
"""Labels, a bias in the layout of the products, what is kept of a row."""
WGMMA = frozenset({"_forward", "_dhidden", "_dweight"})


def cases() -> Iterator[Case]:
    """The fused form's kernels; the chunked form has those of cross_entropy.

    Without a bias nothing spills on sm_90. Where the products' sums lie in tensor memory (sm_100) they come to the
    registers whole, where float32 takes three products of TF32 (sm_80) its operands do: there some do not fit.
    """
    for C, V, dtype, biased, filter, spills in (
        (768, 50304, BF16, False, None, {"_forward": 11, "_dhidden": 14}),
        (4096, 128256, BF16, False, 2.0**-12, {"_forward": 11, "_dweight": 17}),
        (768, 50257, BF16, True, None, {"_forward": 31, "_dweight": 231, "_dhidden": 16}),
        (768, 50304, F32, False, None, {"_dweight": 133, "_dhidden": 156}),
    ):
        inputs = (meta(8192, C, dtype=dtype), meta(V, C, dtype=dtype), meta(V, dtype=dtype) if biased else None)
        options = (meta(8192, dtype=torch.int64), None, -100, "sum", 0.0, 0.0, None, "fused", filter)
        needs, dy, stats = [True, True, biased], meta(dtype=F32), meta(3, 8192, dtype=F32)

        def run(i: tuple = inputs, o: tuple = options, n: list[bool] = needs, dy=dy, stats=stats) -> None:
            linear_cross_entropy.forward(*i, *o, [False] * 3)
            linear_cross_entropy.backward(dy, *i, *o, stats, n)

        extra = (", with bias" if biased else "") + (", filtered" if filter else "")
        name = f"fused 8192x{C}x{V} {'bfloat16' if dtype is BF16 else 'float32'}{extra}"
        yield Case(name, run, narrow=NARROW, spills=spills, wgmma=WGMMA)
