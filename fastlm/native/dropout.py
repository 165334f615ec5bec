"""forward() and backward() of dropout over the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, matrix, output, threads


def forward(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    return _run(x, residual, x.dtype if residual is None else residual.dtype, seed, dropout)


def backward(dy: Tensor, dtype: torch.dtype, seed: Tensor | None, dropout: float) -> Tensor:
    return _run(dy, None, dtype, seed, dropout)


def _run(x: Tensor, residual: Tensor | None, dtype: torch.dtype, seed: Tensor | None, dropout: float) -> Tensor:
    shape = x.shape
    n = shape[-1]
    m = x.numel() // n if n else 0
    _x, x_address, x_stride = matrix("x", x, x.dtype)
    _r, r_address, r_stride = matrix("residual", residual, dtype)
    y = empty(shape, dtype)
    extension().dropout(
        DTYPES[x.dtype], x_address, x_stride, DTYPES[dtype], r_address, r_stride,
        address("seed", seed, torch.int64), dropout, output(y), m, n, threads(),
    )  # fmt: skip
    return y
