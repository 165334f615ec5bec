"""forward() and backward() of rms_norm over the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, matrix, nothing, output, threads, vector

F32 = torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = x.dtype, x.shape
    n = shape[-1]
    m = x.numel() // n if n else 0
    _x, x_address, x_stride = matrix("x", x, dtype)
    _r, r_address, r_stride = matrix("residual", residual, dtype)
    _w, w_address = vector("weight", weight)
    y, rstd = empty(shape, dtype), empty((m,), F32)
    h = nothing(dtype) if residual is None else empty(shape, dtype)
    extension().rms_norm_forward(
        DTYPES[dtype], x_address, x_stride, r_address, r_stride, w_address, offset,
        address("seed", seed, torch.int64), dropout, output(h), output(y), output(rstd), m, n, eps, threads(),
    )  # fmt: skip
    return y, h, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = x.dtype, x.shape
    m, n = rstd.numel(), shape[-1]
    _x, x_address, x_stride = matrix("x", x, dtype)
    _g, g_address, g_stride = matrix("dy", dy, dtype)
    _w, w_address = vector("weight", weight)
    dh = None if dh is None else dh.contiguous()
    dx = empty(shape, dtype)
    dr = nothing(dtype) if seed is None else empty(shape, dtype)
    dw = nothing(F32) if weight is None else empty((n,), F32)
    scratch = empty((extension().norm_scratch(m, n),), F32)
    extension().rms_norm_backward(
        DTYPES[dtype], g_address, g_stride, x_address, x_stride, w_address, offset,
        address("rstd", rstd, F32), address("dh", dh, dtype),
        address("seed", seed, torch.int64), dropout, output(dx), 0 if seed is None else output(dr),
        0 if weight is None else output(dw), output(scratch), m, n, threads(),
    )  # fmt: skip
    return dx, dr, dw if weight is None or weight.dtype is F32 else dw.to(weight.dtype)
