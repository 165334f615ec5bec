from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import cross_entropy

BF16, F32 = torch.bfloat16, torch.float32
SCALARS = {"_total": None, "_wide": 10, "_combine": None}
"""Labels, statistics, the label's own logit; with EDGES also what lies before and after the aligned body."""


def cases() -> Iterator[Case]:
    """The vocabularies of Llama 2, GPT-2 (padded and not), Llama 3, and of single characters."""
    for M, V, dtype, gradient in (
        (16384, 32000, BF16, True),
        (8192, 50304, BF16, True),
        (8192, 50304, BF16, False),
        (8192, 50304, F32, True),
        (8192, 50257, BF16, True),
        (4096, 128256, BF16, True),
        (16, 1 << 20, BF16, True),
    ):
        x, t = meta(M, V, dtype=dtype), meta(M, dtype=torch.int64)
        name = f"{M}x{V} {next(n for n, d in DTYPES.items() if d is dtype)}" + ("" if gradient else " forward only")
        options = (None, -100, "mean", 0.0, 0.0, None)
        yield Case(name, lambda x=x, t=t, o=options, g=gradient: cross_entropy.forward(x, t, *o, g), narrow=SCALARS)
    x, t = meta(8192, 50304, dtype=torch.float16), meta(8192, dtype=torch.int64)
    options, stats = (meta(50304, dtype=F32), -100, "none", 0.1, 1e-4, 30.0), meta(3, 8192, dtype=F32)
    yield Case(
        "every option, backward of none, float16",
        lambda: cross_entropy.backward(meta(8192, dtype=F32), x, t, *options, stats),
        narrow=SCALARS,
    )
    x, t = meta(16384, 65), meta(16384, dtype=torch.int64)
    yield Case("16384x65", lambda: cross_entropy.forward(x, t, None, -100, "mean", 0.0, 0.0, None, True), narrow=None)
    x, dy = meta(8192, 50304), meta(dtype=F32)
    yield Case("8192x50304 upstream gradient", lambda: cross_entropy.scale(x, dy), narrow={"_scale": 1})
