"""embedding: rows of a table by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import cuda
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import define, no_double_backward

# No row for "cpu": PyTorch's own kernels there gather and add at the speed of memory, and the reference calls them.
OP = Op(
    "embedding",
    Backend("triton", "fastlm.kernels.embedding", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.embedding", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.embedding"),
)


def _fake_forward(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _fake_backward(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    return dy.new_empty((classes, dy.shape[-1]))


_forward = define(OP, "forward", "(Tensor ids, Tensor weight, str backend) -> Tensor", _fake_forward)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor ids, SymInt classes, SymInt padding_idx, str backend) -> Tensor",
    _fake_backward,
)


class _Embedding(torch.autograd.Function):
    """Saves ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int, backend: str) -> Any:
        ctx.save_for_backward(ids)
        ctx.classes, ctx.padding_idx, ctx.backend = weight.shape[0], padding_idx, backend
        return _forward(ids, weight, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, _backward(dy, *ctx.saved_tensors, ctx.classes, ctx.padding_idx, ctx.backend), None, None


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *, backend: str | None = None) -> Tensor:
    """y[...] = weight[ids[...]]: the rows of a table that the ids name.

    dweight[v] is the sum of dy over the places where ids is v, added in float32 (float64 for float64) in a fixed order
    and rounded once, whatever the number of places: the same call gives the same bits again. A row no id names is zero.

    Args:
        ids: any shape, int64 or int32, each in [0, V).
        weight: (V, N), float32, bfloat16, float16 or float64; any row stride, a copy is made unless the last is 1.
        padding_idx: the row that gets no gradient, counted from the end when negative; None for none.
        backend: "triton", "cuda" or "reference"; None chooses.

    Returns:
        (*ids.shape, N), dtype of weight, contiguous.

    Raises:
        ValueError: shapes, devices or padding_idx do not agree.
        TypeError: ids are not int64 or int32, or weight is not floating point.
        IndexError: an id is out of range (CPU tensors on "reference"; elsewhere its row of y is NaN and it adds to no
            row of dweight, to spare a host sync; no memory outside the table is read).
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: ids. No double backward.
    """
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (V, N), got {tuple(weight.shape)}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be torch.int64 or torch.int32, got {ids.dtype}")
    check_device("ids", ids, weight, "weight")
    classes = weight.shape[0]
    if classes == 0 and ids.numel():
        raise ValueError(f"weight has no rows, so ids must be empty, got {tuple(ids.shape)}")
    if padding_idx is None:
        padding_idx = -1
    elif -classes <= padding_idx < classes:
        padding_idx %= classes
    else:
        raise ValueError(f"padding_idx must be in [{-classes}, {classes}), got {padding_idx}")
    name = OP.select(weight, backend)
    if torch.is_grad_enabled():
        return _Embedding.apply(ids, weight, padding_idx, name)
    return _forward(ids, weight, name)
