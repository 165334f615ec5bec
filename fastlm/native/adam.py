"""Prepared, forward() and norm() of adam over the C++ extension."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm._walk import Tensors, address_of, filled
from fastlm.native import DTYPES, address, empty, extension, threads

_check = partial(address, contiguous=False)


class Prepared(Tensors):
    """The tensors of one call and the table of their addresses."""

    def __init__(self, *lists: Any) -> None:
        super().__init__(_check, *lists)
        self.addresses = self.table()


def forward(
    prepared: Prepared,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if found_inf is not None and found_inf.item():
        return
    kept, dtype = prepared.gradients(grads)
    addresses = array("q", [g.data_ptr() for g in kept])
    scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    prepared.walk.begin()
    extension().adam_step(
        DTYPES[prepared.dtype], DTYPES[dtype],
        DTYPES.get(prepared.moment_dtype, DTYPES[torch.float32]), DTYPES[prepared.shadow_dtype],
        address_of(prepared.addresses), address_of(addresses), len(kept), float(lr), beta1, beta2, eps, weight_decay,
        decoupled, -scale if maximize else scale, prepared.stochastic, threads(),
    )  # fmt: skip
    prepared.walk.end()


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    kept = filled(grads, _check)
    addresses = array("q", [g.data_ptr() for g in kept])
    sizes = array("q", [g.numel() for g in kept])
    result = empty((), torch.float64)
    extension().adam_norm(
        DTYPES[kept[0].dtype],
        address_of(addresses),
        address_of(sizes),
        len(kept),
        address("result", result, torch.float64),
        threads(),
    )
    return result
