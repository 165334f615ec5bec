"""layer_norm and its form fused with the addition of a residual stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_norm
from fastlm.ops._library import cast, define, distinct, no_double_backward
from fastlm.ops._random import draw_seed

OP = Op(
    "layer_norm",
    Backend("cpu", "fastlm.native.layer_norm", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.layer_norm", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.layer_norm", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.layer_norm"),
)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, stat = math.prod(x.shape[:-1]), _statistics(x)  # numel() would ask for a number the graph may not know
    h = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), h, x.new_empty((m,), dtype=stat), x.new_empty((m,), dtype=stat)


def _fake_backward(
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
    n, dtype = x.shape[-1], _statistics(x) if weight is None else weight.dtype
    dr = x.new_empty((0,) if seed is None else x.shape)
    dw = x.new_empty((n if weight is not None else 0,), dtype=dtype)
    return x.new_empty(x.shape), dr, dw, x.new_empty((n if needs_bias else 0,), dtype=dtype)


_forward = define(
    OP,
    "forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? seed, float dropout, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dh, bool needs_bias, Tensor? seed,"
    " float dropout, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    """Saves h = x [+ residual], weight, mean (M,), rstd (M,) and the seed of dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        seed: Tensor | None,
        dropout: float,
        backend: str,
    ) -> Any:
        y, h, mean, rstd = _forward(x, residual, weight, bias, eps, seed, dropout, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else h, weight, mean, rstd, seed)
        ctx.backend, ctx.dropout, ctx.bias_dtype = backend, dropout, None if bias is None else bias.dtype
        return y if residual is None else (y, h)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        h, weight, mean, rstd, seed = ctx.saved_tensors
        if dy is None and seed is None:  # only the residual stream was used
            return dh, dh, *(None,) * 6
        if dy is None:
            dy = torch.zeros_like(h)
        needs_bias = ctx.bias_dtype is not None
        dx, dr, dw, db = _backward(dy, h, weight, mean, rstd, dh, needs_bias, seed, ctx.dropout, ctx.backend)
        dresidual = None if not ctx.needs_input_grad[1] else dx if seed is None else dr
        dweight = None if weight is None else dw
        dbias = None if ctx.bias_dtype is None else cast(db, ctx.bias_dtype)
        return dx, dresidual, dweight, dbias, None, None, None, None


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalises the last dimension, then scales and shifts it (Ba et al. 2016, arXiv:1607.06450).

    y = (x - mean) / sqrt(var + eps) * weight + bias, var being the biased variance. Accumulates in float32 (float64
    for float64).

    Args:
        x: (..., N), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        weight, bias: (N,), any floating dtype; None stands for ones and zeros.
        eps: added to the variance, in units of x squared.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        (..., N), dtype of x, contiguous.

    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: x, weight, mean (M,) and rstd (M,) in float32. No double backward.
    """
    check_norm(x, None, weight, bias)
    name = OP.select(x, backend)
    if torch.is_grad_enabled():
        return _LayerNorm.apply(*distinct(x, None, weight, bias), eps, None, 0.0, name)
    return _forward(x, None, weight, bias, eps, None, 0.0, name)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = dropout(x) + residual, y = layer_norm(h, weight, bias, eps), in one pass; so is the backward, dh included.

    Args:
        x, residual: (..., N), same shape and dtype.
        dropout: probability in [0, 1) that an element of x is dropped; the kept ones are divided by 1 - dropout. Drawn
            from torch's default generator, and the same on every backend. The rest as layer_norm.

    Returns:
        (y, h), both (..., N) in the dtype of x. h is rounded to that dtype before it is normalised, as in the unfused
        form.

    Raises as layer_norm, and ValueError where dropout is no probability below 1. Saves as layer_norm, with h in place
    of x, and one number as seed of dropout.
    """
    check_norm(x, residual, weight, bias)
    name = OP.select(x, backend)
    seed = draw_seed(dropout, x.device)  # a call that is refused draws nothing
    if torch.is_grad_enabled():
        return _LayerNorm.apply(*distinct(x, residual, weight, bias), eps, seed, float(dropout), name)
    y, h, _, _ = _forward(x, residual, weight, bias, eps, seed, float(dropout), name)
    return y, h
