"""Prepared, forward() and norm() of adam over the CUDA launchers.

The launchers copy addresses from the host's memory into the arguments of kernels: there are no tables on the device to
fill, and a CUDA graph has copies of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm._walk import Tensors, address_of, filled
from fastlm.cuda import DTYPES, address, empty, extension, lane, output

NORM_CHUNK = 16384
"""Elements that a block of the norm adds up (csrc/cuda/adam.h)."""
SCALARS = 8
"""float32 numbers that a step works out for each tensor."""
_check = partial(address, contiguous=False)
_replayed: list[object] = []
"""Copies of tensors that a CUDA graph reads and writes: it may outlive the optimizer that holds them."""


class Prepared(Tensors):
    """The tensors of one call and the table of their addresses, in memory of the host."""

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
    first = prepared.walk.params[0]
    kept, dtype = prepared.gradients(grads)
    addresses = array("q", [g.data_ptr() for g in kept])
    lr_at = lr if isinstance(lr, Tensor) and lr.device == prepared.device else None
    lr_at, lr_address, lr_double = _number("lr", lr_at, prepared.device)
    grad_scale, scale_address, scale_double = _number("grad_scale", grad_scale, prepared.device)
    found_inf, found_address, found_double = _number("found_inf", found_inf, prepared.device)
    scalars = empty((len(kept), SCALARS), first, torch.float32)
    if prepared.walk.copies and first.is_cuda and torch.cuda.is_current_stream_capturing():
        _replayed.append(prepared.walk.copies)
    prepared.walk.begin()
    extension().adam_step(
        DTYPES[prepared.dtype], DTYPES[dtype], DTYPES[prepared.shadow_dtype], address_of(prepared.addresses),
        address_of(addresses), len(kept), output(scalars), 0.0 if lr_at is not None else float(lr), lr_address,
        lr_double, beta1, beta2, eps, weight_decay, decoupled, maximize, scale_address, scale_double, found_address,
        found_double, prepared.stochastic, *lane(first),
    )  # fmt: skip
    prepared.walk.end()


def _number(name: str, value: Tensor | None, device: torch.device) -> tuple[Tensor | None, int, bool]:
    """A number that is read on the device: the tensor to keep until then, its address, whether it is float64."""
    if value is None:
        return None, 0, False
    if value.device != device:
        value = value.to(device, non_blocking=True)
    if value.dtype is not torch.float64 and value.dtype is not torch.float32:
        value = value.to(torch.float32)
    return value, address(name, value, torch.float32, torch.float64), value.dtype is torch.float64


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    kept = filled(grads, _check)
    addresses = array("q", [g.data_ptr() for g in kept])
    sizes = array("q", [g.numel() for g in kept])
    parts = empty((sum(-(-size // NORM_CHUNK) for size in sizes),), kept[0], torch.float64)
    result = empty((), kept[0], torch.float64)
    extension().adam_norm(
        DTYPES[kept[0].dtype], address_of(addresses), address_of(sizes), len(kept), output(parts), output(result),
        *lane(kept[0]),
    )  # fmt: skip
    return result
