"""forward() and backward() of rms_norm over the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, float32, rows, threads

F32 = torch.float32


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (m, n) = x.dtype, (x.numel() // max(x.shape[-1], 1), x.shape[-1])
    xr, rr, w = rows(x), None if residual is None else rows(residual), float32(weight)
    y = empty(x.shape, dtype)
    h = empty(x.shape if rr is not None else (0,), dtype)
    rstd = empty((m,), F32)
    extension().rms_norm_forward(
        DTYPES[dtype],
        address("x", xr, dtype, contiguous=False), xr.stride(0),
        address("residual", rr, dtype, contiguous=False), 0 if rr is None else rr.stride(0),
        address("weight", w, F32), offset,
        address("h", h, dtype), address("y", y, dtype), address("rstd", rstd, F32),
        m, n, eps, threads(),
    )  # fmt: skip
    return y, h, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dh: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    dtype, (m, n) = x.dtype, (rstd.numel(), x.shape[-1])
    xr, gr, w = rows(x), rows(dy), float32(weight)
    dh = None if dh is None else dh.contiguous()
    dx = empty(x.shape, dtype)
    dw = empty((n if weight is not None else 0,), F32)
    scratch = empty((extension().norm_scratch(m, n),), F32)
    extension().rms_norm_backward(
        DTYPES[dtype],
        address("dy", gr, dtype, contiguous=False), gr.stride(0),
        address("x", xr, dtype, contiguous=False), xr.stride(0),
        address("weight", w, F32), offset, address("rstd", rstd, F32),
        address("dh", dh, dtype), address("dx", dx, dtype),
        address("dweight", dw if weight is not None else None, F32),
        address("scratch", scratch, F32), m, n, threads(),
    )  # fmt: skip
    return dx, dw
