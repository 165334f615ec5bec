"""forward() and backward() of embedding over the CUDA launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, matrix, output

PIECE = 128
"""Sorted positions of a partial sum (EMBEDDING_PIECE in csrc/cuda/embedding.h)."""
_IDS = (torch.int64, torch.int32)


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    dtype, (v, n), ids = weight.dtype, weight.shape, ids.contiguous()
    y = empty((*ids.shape, n), weight)
    if total := y.numel():
        _kept, table, stride = matrix("weight", weight, dtype)
        extension().embedding_forward(
            DTYPES[dtype], ids.dtype is torch.int64, address("ids", ids, *_IDS), table, stride, output(y), total // n,
            v, n, *lane(y),
        )  # fmt: skip
    return y


def backward(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    dtype, n, m = dy.dtype, dy.shape[-1], ids.numel()
    dweight = empty((classes, n), dy)
    if m == 0 or dweight.numel() == 0:
        return dweight.zero_()
    keys = ids.reshape(-1)
    if keys.dtype is torch.int64 and classes < 2**31:  # ids out of range come first and last; half the passes to sort
        keys = keys.clamp(-1, classes).to(torch.int32)
    keys, order = torch.sort(keys, stable=True)
    starts = empty((classes + 1,), dy, torch.int64)
    partial = empty((m // PIECE, n + -n % (16 // dtype.itemsize)), dy, torch.float32)
    _kept, gradient, stride = matrix("dy", dy, dtype)
    wide, sorted_ids = keys.dtype is torch.int64, address("ids", keys, *_IDS)
    launchers, where = extension(), lane(dweight)
    launchers.embedding_starts(wide, sorted_ids, output(starts), m, classes, *where)
    launchers.embedding_backward(
        DTYPES[dtype], gradient, stride, wide, sorted_ids, address("order", order, torch.int64), output(starts),
        output(partial), output(dweight), m, classes, n, padding_idx, *where,
    )  # fmt: skip
    return dweight
