"""softmax and its logarithm over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import cuda
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_floating
from fastlm.ops._library import define, no_double_backward

# No row for "cpu": PyTorch's own kernel there reads once and writes once, and the reference calls it.
OP = Op(
    "softmax",
    Backend("triton", "fastlm.kernels.softmax", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.softmax", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.softmax"),
)


def _fake_forward(x: Tensor, log: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, y: Tensor, log: bool) -> Tensor:
    return y.new_empty(y.shape)


_forward = define(OP, "forward", "(Tensor x, bool log, str backend) -> Tensor", _fake_forward)
_backward = define(OP, "backward", "(Tensor dy, Tensor y, bool log, str backend) -> Tensor", _fake_backward)


class _Softmax(torch.autograd.Function):
    """Saves y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: bool, backend: str) -> Any:
        y = _forward(x, log, backend)
        ctx.save_for_backward(y)
        ctx.log, ctx.backend = log, backend
        return y

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _backward(dy, *ctx.saved_tensors, ctx.log, ctx.backend), None, None


def softmax(x: Tensor, *, log: bool = False, backend: str | None = None) -> Tensor:
    """Softmax over the last dimension, or its logarithm.

    y[i] = exp(x[i]) / sum_j exp(x[j]); with log, y[i] = x[i] - log(sum_j exp(x[j])). The row's largest element is taken
    off first, so that nothing overflows; the online form for long rows is Milakov and Gimelshein 2018,
    arXiv:1805.02867. Computes in float32 (float64 for float64) and rounds once.

    Args:
        x: (..., N), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1. -inf is a
            class that cannot be; a row of nothing else gives NaN, as in torch.
        log: whether to return the logarithm.
        backend: "triton", "cuda" or "reference"; None chooses.

    Returns:
        (..., N), dtype of x, contiguous.

    Raises:
        ValueError: x is a scalar.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: y. No double backward.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    name = OP.select(x, backend)
    if torch.is_grad_enabled():
        return _Softmax.apply(x, log, name)
    return _forward(x, log, name)
