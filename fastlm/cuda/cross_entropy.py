"""forward() and backward() of cross_entropy over the CUDA launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, nothing, output, vector

F32, I64 = torch.float32, torch.int64
SCRATCH = 257
"""fastlm::cuda::cross_entropy_scratch."""


def as_rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_grad: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (m, v), reduced = logits.dtype, logits.shape, reduction != "none"
    x, (weight, weights, weight_dtype) = as_rows(logits), vector("weight", weight)
    loss, stats = empty(() if reduced else (m,), logits, F32), empty((3, m), logits, F32)
    dlogits = None if not needs_grad else empty((m, v), logits) if out is None else x
    room = (SCRATCH + m if reduced else SCRATCH) if reduced or (weights and label_smoothing) else 0
    scratch = empty((room,), logits, F32) if room else None
    extension().cross_entropy_forward(
        DTYPES[dtype], address("logits", x, dtype, contiguous=False), x.stride(0),
        address("target", target, I64, contiguous=False), target.stride(0), weights, weight_dtype, ignore_index,
        reduction == "mean", reduced, label_smoothing, z_loss, softcap or 0.0, output(loss), output(stats),
        0 if dlogits is None else output(dlogits), 0 if dlogits is None else dlogits.stride(0),
        0 if scratch is None else output(scratch), m, v, *lane(x),
    )  # fmt: skip
    if out is not None and x is not out:  # as_rows() made a copy
        out.copy_(x)
    return loss, stats, nothing(logits) if dlogits is None or out is not None else dlogits


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    dtype, (m, v), mean = logits.dtype, logits.shape, reduction == "mean"
    x, (weight, weights, weight_dtype) = as_rows(logits), vector("weight", weight)
    dy = dy if dy.dtype is F32 else dy.to(F32)
    dlogits = empty((m, v), logits) if out is None else x
    scratch = empty((SCRATCH,), logits, F32) if mean or (weights and label_smoothing) else None
    extension().cross_entropy_backward(
        DTYPES[dtype], address("dy", dy, F32, contiguous=False), dy.stride(0) if dy.dim() else 0,
        address("logits", x, dtype, contiguous=False), x.stride(0), address("target", target, I64, contiguous=False),
        target.stride(0), weights, weight_dtype, ignore_index, mean, label_smoothing, z_loss, softcap or 0.0,
        address("stats", stats, F32), output(dlogits), dlogits.stride(0), 0 if scratch is None else output(scratch),
        m, v, *lane(x),
    )  # fmt: skip
    if out is None:
        return dlogits
    if x is not out:
        out.copy_(x)
    return nothing(logits)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a tensor of one element that is nearly always 1: the GPU looks, and then leaves it alone."""
    if factor.dtype is not F32 or not gradient.is_contiguous():
        gradient.mul_(factor)
        return
    dtype = gradient.dtype
    extension().cross_entropy_scale(
        DTYPES[dtype], address("gradient", gradient, dtype), address("factor", factor, F32), gradient.numel(),
        *lane(gradient),
    )  # fmt: skip
