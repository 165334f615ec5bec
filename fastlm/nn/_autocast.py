"""What torch.autocast does to the functions it knows. Ours are new to it, so they ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm._shadow import find


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype matrix products run in on this device, or None outside autocast."""
    # Of the meta device, where models tell their shapes, torch.is_autocast_enabled knows nothing, and raises.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def lower(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The tensor in the autocast dtype; float64, integers and bool stay, as under torch.autocast.

    A parameter's shadow (`fastlm.optim.AdamW(shadow_dtype=...)`) where it has one that is up to date, else
    `tensor.to(dtype)`. Differentiable either way; the result is not to be written.
    """
    if _stays(tensor, dtype):
        return tensor
    assert tensor is not None and dtype is not None
    shadow = _shadow(tensor, dtype)
    if shadow is None:
        return tensor.to(dtype)
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Lower.apply(tensor, shadow)
    return shadow


def lower_values(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The values of lower() outside autograd: for an op that makes the parameter's own gradient. Costs a microsecond
    where the parameter has a shadow."""
    if _stays(tensor, dtype):
        return None if tensor is None else tensor.detach()
    assert tensor is not None and dtype is not None
    shadow = _shadow(tensor, dtype)
    return tensor.detach().to(dtype) if shadow is None else shadow


def _stays(tensor: Tensor | None, dtype: torch.dtype | None) -> bool:
    return (
        tensor is None or dtype is None or tensor.dtype is dtype or not tensor.is_floating_point()
        or tensor.dtype is torch.float64
    )  # fmt: skip


def _shadow(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """No shadow in a traced graph, which would keep it, nor beneath functorch, which wants gradients of its own."""
    elsewhere = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return None if elsewhere or tensor.dtype is not torch.float32 else find(tensor, dtype)


class _Lower(torch.autograd.Function):
    """The shadow in the parameter's place: forward moves nothing, backward is that of a cast."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shadow: Tensor) -> Tensor:
        return shadow.detach()  # not a view to autograd, yet writes to the shadow are counted on both

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(torch.float32), None
