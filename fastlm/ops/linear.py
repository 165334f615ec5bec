"""linear: y = x W^T + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm._walk import across
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import cast, define, no_double_backward

OP = Op(
    "linear",
    Backend("cpu", "fastlm.native.linear", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("reference", "fastlm.reference.linear"),
)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wide: bool, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stat = torch.float64 if x.dtype is torch.float64 else torch.float32
    dtype = stat if wide else x.dtype
    if not needs_weight:
        dweight = x.new_empty((0,), dtype=dtype)
    elif across(weight):
        dweight = x.new_empty(weight.shape[::-1], dtype=dtype).t()
    else:
        dweight = x.new_empty(weight.shape, dtype=dtype)
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        dweight,
        x.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=stat),
    )


_forward = define(OP, "forward", "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _fake_forward)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor x, Tensor weight, bool wide, bool needs_x, bool needs_weight, bool needs_bias, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _Linear(torch.autograd.Function):
    """Saves x where weight, and the weight where x needs a gradient, both in the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        low, w = cast(x, dtype), cast(weight, dtype) if values is None else values
        ctx.save_for_backward(low, w)
        ctx.dtypes, ctx.backend = (x.dtype, weight.dtype, None if bias is None else bias.dtype), backend
        return _forward(low, w, bias, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wide = weight_dtype is not x.dtype
        dx, dweight, dbias = _backward(dy, x, weight, wide, needs_x, needs_weight, needs_bias, ctx.backend)
        return (
            cast(dx, x_dtype) if needs_x else None,
            cast(dweight, weight_dtype) if needs_weight else None,
            cast(dbias, bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    values: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x W^T + b, with products in the dtype of x, under autocast in autocast's, and sums in float32.

    A float32 weight under half products gets its float32 sums for a gradient, and bias those of dy's rows: they are
    never rounded to the half type, as a cast's backward would do.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: (N, K), any floating dtype; the transpose of a (K, N) parameter gets a gradient that lies as that does.
        bias: (N,), any floating dtype, or None.
        values: weight in the dtype of the products, where a copy is kept; None makes one where the dtypes differ.
            Nothing is differentiated through it: the gradient is weight's.
        backend: "cpu" or "reference", which is torch's own product; None chooses.

    Returns:
        (..., N), contiguous, in the dtype of the products.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not agree.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: x and weight in the dtype of the products. No double backward.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    shape, device = weight.shape, x.device
    if not x.dim() or len(shape) != 2 or x.shape[-1] != shape[1]:
        raise ValueError(f"x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(shape)}")
    if weight.device != device:
        check_device("weight", weight, x, "x")
    if bias is not None:
        check_floating("bias", bias)
        if bias.device != device:
            check_device("bias", bias, x, "x")
        if bias.shape != shape[:1]:
            raise ValueError(f"bias must be ({shape[0]},) like the rows of weight, got {tuple(bias.shape)}")
    dtype = x.dtype
    if torch.is_autocast_enabled(device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if values is not None and (values.shape != shape or values.dtype is not dtype):
        came = f"{tuple(values.shape)} of {values.dtype}"
        raise ValueError(f"values must be {tuple(shape)} of {dtype}, the dtype of the products, got {came}")
    name = OP.select(x, backend)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, values, dtype, name)
    return _forward(cast(x, dtype), cast(weight, dtype) if values is None else values, bias, name)
