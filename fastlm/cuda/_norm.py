"""forward() and backward() of layer_norm and rms_norm over the CUDA launchers: rms_norm is the case without a mean."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, matrix, nothing, output, vector

F32 = torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, h (empty without a residual), mean (only if center) and rstd."""
    dtype, shape = x.dtype, x.shape
    n = shape[-1]
    m = x.numel() // n if n else 0
    _x, x_address, x_stride = matrix("x", x, dtype)
    _r, r_address, r_stride = matrix("residual", residual, dtype)
    _w, w_address, w_dtype = vector("weight", weight)
    _b, b_address, b_dtype = vector("bias", bias)
    y, rstd = empty(shape, x), empty((m,), x, F32)
    mean = empty((m,), x, F32) if center else None
    h = nothing(x) if residual is None else empty(shape, x)
    extension().norm_forward(
        DTYPES[dtype], x_address, x_stride, r_address, r_stride, w_address, w_dtype, offset, b_address, b_dtype,
        address("seed", seed, torch.int64), dropout, 0 if residual is None else output(h), output(y),
        0 if mean is None else output(mean), output(rstd), m, n, eps, *lane(x),
    )  # fmt: skip
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    needs_bias: bool,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (empty without dropout: dx is both), dweight, dbias (empty where not asked for)."""
    dtype, shape = x.dtype, x.shape
    m, n = rstd.numel(), shape[-1]
    device, stream = lane(x)
    _x, x_address, x_stride = matrix("x", x, dtype)
    _g, g_address, g_stride = matrix("dy", dy, dtype)
    _w, w_address, w_dtype = vector("weight", weight)
    dh = None if dh is None else dh.contiguous()
    dx = empty(shape, x)
    dr = nothing(x) if seed is None else empty(shape, x)
    wanted = F32 if weight is None else weight.dtype
    written = wanted if wanted in DTYPES else F32
    dw = nothing(x, written) if weight is None else empty((n,), x, written)
    db = empty((n,), x, written) if needs_bias else nothing(x, written)
    sums = (weight is not None) + needs_bias
    parts = empty((sums, extension().norm_parts(DTYPES[dtype], m, n, device), n), x, F32) if sums else None
    extension().norm_backward(
        DTYPES[dtype], g_address, g_stride, x_address, x_stride, w_address, w_dtype, offset,
        address("mean", mean, F32), address("rstd", rstd, F32), address("dh", dh, dtype),
        address("seed", seed, torch.int64), dropout, output(dx), 0 if seed is None else output(dr),
        0 if weight is None else output(dw), output(db) if needs_bias else 0, 0 if parts is None else output(parts),
        m, n, device, stream,
    )  # fmt: skip
    return (dx, dr, dw, db) if written is wanted else (dx, dr, dw.to(wanted), db.to(wanted))
