"""Every op in plain PyTorch: the specification, the oracle of the tests in float64, and the path for any device."""

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype the reference computes in: float64 stays, everything else is float32."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
