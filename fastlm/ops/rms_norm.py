"""rms_norm and its form fused with the addition of a residual stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_norm
from fastlm.ops._library import define, distinct, no_double_backward
from fastlm.ops._random import draw_seed

OP = Op(
    "rms_norm",
    Backend("cpu", "fastlm.native.rms_norm", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.rms_norm", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.rms_norm", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.rms_norm"),
)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(x.shape if residual is not None else (0,))
    m = math.prod(x.shape[:-1])  # numel() would ask for a number the graph may not know
    return x.new_empty(x.shape), h, x.new_empty((m,), dtype=_statistics(x))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dr = x.new_empty((0,) if seed is None else x.shape)
    dw = x.new_empty((0,), dtype=_statistics(x)) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dr, dw


_forward = define(
    OP,
    "forward",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, Tensor? seed, float dropout, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? dh, float offset, Tensor? seed, float dropout,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _RmsNorm(torch.autograd.Function):
    """Saves h = x [+ residual], weight, rstd (M,) and the seed of dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        offset: float,
        seed: Tensor | None,
        dropout: float,
        backend: str,
    ) -> Any:
        y, h, rstd = _forward(x, residual, weight, eps, offset, seed, dropout, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else h, weight, rstd, seed)
        ctx.backend, ctx.offset, ctx.dropout = backend, offset, dropout
        return y if residual is None else (y, h)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        h, weight, rstd, seed = ctx.saved_tensors
        if dy is None and seed is None:  # only the residual stream was used
            return dh, dh, *(None,) * 6
        if dy is None:
            dy = torch.zeros_like(h)
        dx, dr, dw = _backward(dy, h, weight, rstd, dh, ctx.offset, seed, ctx.dropout, ctx.backend)
        dresidual = None if not ctx.needs_input_grad[1] else dx if seed is None else dr
        dweight = None if weight is None else dw
        return dx, dresidual, dweight, None, None, None, None, None


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
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

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
        return _RmsNorm.apply(x, None, weight, eps, offset, None, 0.0, name)
    return _forward(x, None, weight, eps, offset, None, 0.0, name)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = dropout(x) + residual, y = rms_norm(h, weight, eps, offset=offset), in one pass; so is the backward.

    Args:
        x, residual: (..., N), same shape and dtype.
        dropout: probability in [0, 1) that an element of x is dropped; the kept ones are divided by 1 - dropout. Drawn
            from torch's default generator, and the same on every backend. The rest as rms_norm.

    Returns:
        (y, h), both (..., N) in the dtype of x. h is rounded to that dtype before it is normalised, as in the unfused
        form.

    Raises as rms_norm, and ValueError where dropout is no probability below 1. Saves as rms_norm, with h in place of
    x, and one number as seed of dropout.
    """
    check_norm(x, residual, weight, None)
    name = OP.select(x, backend)
    seed = draw_seed(dropout, x.device)  # a call that is refused draws nothing
    eps = _default_eps(x) if eps is None else eps
    if torch.is_grad_enabled():
        return _RmsNorm.apply(*distinct(x, residual), weight, eps, offset, seed, float(dropout), name)
    y, h, _ = _forward(x, residual, weight, eps, offset, seed, float(dropout), name)
    return y, h
