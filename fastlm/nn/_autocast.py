"""What torch.autocast does to the functions it knows. Ours are new to it, so they ask."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype matrix products run in on this device, or None outside autocast."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def lower(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The tensor in the autocast dtype; float64, integers and bool stay, as under torch.autocast."""
    if tensor is None or dtype is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)
