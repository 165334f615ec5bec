"""forward() and backward() of layer_norm over the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, matrix, nothing, output, threads, vector

F32 = torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, shape = x.dtype, x.shape
    n = shape[-1]
    m = x.numel() // n if n else 0
    _x, x_address, x_stride = matrix("x", x, dtype)
    _r, r_address, r_stride = matrix("residual", residual, dtype)
    _w, w_address = vector("weight", weight)
    _b, b_address = vector("bias", bias)
    y, mean, rstd = empty(shape, dtype), empty((m,), F32), empty((m,), F32)
    h = nothing(dtype) if residual is None else empty(shape, dtype)
    extension().layer_norm_forward(
        DTYPES[dtype], x_address, x_stride, r_address, r_stride, w_address, b_address,
        address("seed", seed, torch.int64), dropout, output(h), output(y), output(mean), output(rstd), m, n, eps,
        threads(),
    )  # fmt: skip
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    needs_bias: bool,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, shape = x.dtype, x.shape
    m, n = mean.numel(), shape[-1]
    _x, x_address, x_stride = matrix("x", x, dtype)
    _g, g_address, g_stride = matrix("dy", dy, dtype)
    _w, w_address = vector("weight", weight)
    dh = None if dh is None else dh.contiguous()
    dx = empty(shape, dtype)
    dr = nothing(dtype) if seed is None else empty(shape, dtype)
    dw = nothing(F32) if weight is None else empty((n,), F32)
    db = empty((n,), F32) if needs_bias else nothing(F32)
    scratch = empty((extension().norm_scratch(m, n),), F32)
    extension().layer_norm_backward(
        DTYPES[dtype], g_address, g_stride, x_address, x_stride, w_address,
        address("mean", mean, F32), address("rstd", rstd, F32), address("dh", dh, dtype),
        address("seed", seed, torch.int64), dropout, output(dx), 0 if seed is None else output(dr),
        0 if weight is None else output(dw), output(db) if needs_bias else 0, output(scratch), m, n, threads(),
    )  # fmt: skip
    wanted = F32 if weight is None else weight.dtype
    return (dx, dr, dw, db) if wanted is F32 else (dx, dr, dw.to(wanted), db.to(wanted))
