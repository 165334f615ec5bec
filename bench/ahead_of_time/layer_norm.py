from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.ahead_of_time import Case, meta
from fastlm.kernels import layer_norm

NARROW = {"_forward": 5, "_forward_wide": 3, "_backward": 15, "_backward_wide": 3, "_columns": 6, "_add_parts": 2}
"""Statistics, the seed of dropout, parameters of short rows, and the sums over rows."""


def both(dtype: torch.dtype, n: int, residual: bool, dropout: float = 0.0) -> Callable[[], object]:
    """Forward and backward of (8192, N) with weight and bias."""
    x, weight, seed = meta(8192, n, dtype=dtype), meta(n, dtype=dtype), meta(1, dtype=torch.int64) if dropout else None
    other = x if residual else None

    def run() -> None:
        y, _, mean, rstd = layer_norm.forward(x, other, weight, weight, 1e-5, seed, dropout)
        layer_norm.backward(y, x, weight, mean, rstd, other, True, seed, dropout)

    return run


def cases() -> Iterator[Case]:
    for n in (256, 1024, 4096, 8192, 16384):
        yield Case(f"bfloat16 {n}", both(torch.bfloat16, n, False), NARROW)
    for n in (768, 8192, 65536):
        yield Case(f"add float32 {n}", both(torch.float32, n, True), NARROW)
    for n in (4096, 16384):
        yield Case(f"add dropout bfloat16 {n}", both(torch.bfloat16, n, True, 0.1), NARROW)
