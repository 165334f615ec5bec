"""dropout and its form fused with the addition of a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import define, distinct, no_double_backward
from fastlm.ops._random import check_dropout, draw_seed

# No rows for GPUs: torch's own dropout is one vectorised kernel there. On the CPU its generator is serial.
OP = Op(
    "dropout",
    Backend("cpu", "fastlm.native.dropout", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("reference", "fastlm.reference.dropout"),
)


def _fake_forward(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


def _fake_backward(dy: Tensor, dtype: torch.dtype, seed: Tensor | None, dropout: float) -> Tensor:
    return dy.new_empty(dy.shape, dtype=dtype)


_forward = define(
    OP, "forward", "(Tensor x, Tensor? residual, Tensor? seed, float dropout, str backend) -> Tensor", _fake_forward
)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, ScalarType dtype, Tensor? seed, float dropout, str backend) -> Tensor",
    _fake_backward,
)


class _Dropout(torch.autograd.Function):
    """Saves the seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float, backend: str) -> Any:
        ctx.save_for_backward(seed)
        ctx.dtype, ctx.dropout, ctx.backend = x.dtype, dropout, backend
        return _forward(x, residual, seed, dropout, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        dx = dy if seed is None and dy.dtype is ctx.dtype else _backward(dy, ctx.dtype, seed, ctx.dropout, ctx.backend)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None


def dropout(x: Tensor, dropout: float, *, backend: str | None = None) -> Tensor:
    """Drops elements with probability `dropout` and divides the others by 1 - dropout (Srivastava et al. 2014,
    Journal of Machine Learning Research 15).

    Which ones is a hash of a number from torch's default generator, the row and the column: vectorised, the same on
    every backend, and made again in the backward in place of a mask in memory.

    Args:
        x: (..., N), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        dropout: in [0, 1).
        backend: "cpu" or "reference"; None chooses.

    Returns:
        (..., N), dtype of x, contiguous; x itself where dropout is 0.

    Raises:
        ValueError: dropout is no probability below 1; x is a scalar.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: one number. No double backward.
    """
    return _call(x, None, dropout, backend)


def dropout_add(x: Tensor, residual: Tensor, dropout: float = 0.0, *, backend: str | None = None) -> Tensor:
    """dropout(x) + residual in one pass, and so is the backward.

    Args:
        x: (..., N), the output of a branch.
        residual: (..., N), of any floating dtype: under autocast float32 beside an x of 16 bits. The rest as dropout.

    Returns:
        (..., N), dtype of residual, contiguous, rounded once.

    Raises as dropout, and ValueError where residual has another shape or device than x. Saves as dropout.
    """
    check_floating("residual", residual)
    return _call(x, residual, dropout, backend)


def _call(x: Tensor, residual: Tensor | None, dropout: float, backend: str | None) -> Tensor:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if residual is not None:
        check_device("residual", residual, x, "x")
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    check_dropout(dropout)
    if residual is None and dropout == 0.0:
        return x
    wide = residual is not None and residual.dtype is torch.float64
    name = OP.select(residual if wide and residual is not None else x, backend)
    seed = draw_seed(dropout, x.device)
    if torch.is_grad_enabled():
        return _Dropout.apply(*distinct(x, residual), seed, float(dropout), name)
    return _forward(x, residual, seed, float(dropout), name)
