"""forward() and backward() of embedding by PyTorch's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.reference import wide


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    if ids.is_cpu:  # raises where an id is out of range; elsewhere that would stop the device
        return F.embedding(ids, weight).contiguous()
    wrong = (ids < 0) | (ids >= weight.shape[0])
    return F.embedding(ids.masked_fill(wrong, 0), weight).masked_fill(wrong[..., None], float("nan")).contiguous()


def backward(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    add = torch.ops.aten.embedding_dense_backward
    if ids.is_cpu and wide(dy) is dy:
        return add(dy, ids, classes, padding_idx, False)
    if ids.is_cpu:  # a float32 table of the named rows alone: of all rows it would take longer than everything else
        named, places = torch.unique(ids, return_inverse=True)
        dweight = dy.new_zeros(classes, dy.shape[-1])
        dweight[named.long()] = add(wide(dy), places, named.numel(), -1, False).to(dy.dtype)
        if padding_idx >= 0:
            dweight[padding_idx] = 0
        return dweight
    dropped = (ids < 0) | (ids >= classes) | (ids == padding_idx)
    return add(wide(dy), ids.masked_fill(dropped, classes), classes + 1, classes, False)[:classes].to(dy.dtype)
