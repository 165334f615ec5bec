"""rms_norm and its form fused with the addition of a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.ops._check import check_norm
from fastlm.ops._library import cast, define, no_double_backward

OP = Op(
    "rms_norm",
    Backend("cpu", "fastlm.native.rms_norm", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("reference", "fastlm.reference.rms_norm"),
)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), h, x.new_empty((x.shape[:-1].numel(),), dtype=_statistics(x))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dh: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    dw = x.new_empty((x.shape[-1] if weight is not None else 0,), dtype=_statistics(x))
    return x.new_empty(x.shape), dw


_forward = define(
    OP,
    "forward",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? dh, float offset, str backend) -> (Tensor, Tensor)",
    _fake_backward,
)


class _RmsNorm(torch.autograd.Function):
    """Saves h = x [+ residual], weight and rstd (M,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, backend: str
    ) -> Any:
        y, h, rstd = _forward(x, residual, weight, eps, offset, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.backend, ctx.offset = backend, offset
        return y if residual is None else (y, h)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        h, weight, rstd = ctx.saved_tensors
        if dy is None:  # only the residual stream was used
            return dh, dh, None, None, None, None
        dx, dw = _backward(dy, h, weight, rstd, dh, ctx.offset, ctx.backend)
        dweight = None if weight is None else cast(dw, weight.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None, None, None


def _default_eps(x: Tensor) -> float:
    """torch's: the machine epsilon of the dtype it accumulates in, not of the input's."""
    return torch.finfo(_statistics(x)).eps


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Divides by the root mean square of the last dimension, then scales (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * (weight + offset). Accumulates in float32 (float64 for float64) and rounds once.

    Args:
        x: (..., N), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        weight: (N,), any floating dtype; None leaves x / rms unscaled.
        eps: added to the mean square, in units of x squared; None is the machine epsilon of float32 (of float64 for
            float64), as in torch.
        offset: added to the weight: 1.0 gives Gemma's (1 + weight). Unused without a weight.
        backend: "cpu" or "reference"; None chooses.

    Returns:
        (..., N), dtype of x, contiguous.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: x, weight and rstd (M,) in float32. No double backward.
    """
    check_norm(x, None, weight, None)
    name = OP.select(x, backend)
    eps = _default_eps(x) if eps is None else eps
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, None, weight, eps, offset, name)
    return _forward(x, None, weight, eps, offset, name)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = rms_norm(h, weight, eps, offset=offset), in one pass; so is the backward.

    Args:
        x, residual: (..., N), same shape and dtype. The rest as rms_norm.

    Returns:
        (y, h), both (..., N) in the dtype of x. h is rounded to that dtype before it is normalised, as in the unfused
        form.

    Raises and saves as rms_norm, with h in place of x.
    """
    check_norm(x, residual, weight, None)
    name = OP.select(x, backend)
    eps = _default_eps(x) if eps is None else eps
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, residual, weight, eps, offset, name)
    y, h, _ = _forward(x, residual, weight, eps, offset, name)
    return y, h
