from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.ahead_of_time import Case, meta
from bench.ahead_of_time.layer_norm import NARROW
from fastlm.kernels import rms_norm


def both(dtype: torch.dtype, n: int, residual: bool) -> Callable[[], object]:
    """Forward and backward of (8192, N) with a weight that 1 is added to."""
    x, weight = meta(8192, n, dtype=dtype), meta(n)
    other = x if residual else None

    def run() -> None:
        y, _, rstd = rms_norm.forward(x, other, weight, 1e-6, 1.0, None, 0.0)
        rms_norm.backward(y, x, weight, rstd, other, 1.0, None, 0.0)

    return run


def cases() -> Iterator[Case]:
    for n in (128, 4096):
        yield Case(f"bfloat16 {n}", both(torch.bfloat16, n, False), NARROW)
    for n in (8192, 16384):
        yield Case(f"add float32 {n}", both(torch.float32, n, True), NARROW)
