"""forward() and backward() of gelu in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.reference import wide


def gelu(x: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative, in the dtype of x. glu's gate uses it too."""
    value = F.gelu(x, approximate="tanh" if tanh else "none")
    if tanh:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        slope = math.sqrt(8 / math.pi)
        s = torch.sigmoid(slope * (x + 0.044715 * x**3))
        return value, s + x * s * (1 - s) * slope * (1 + 3 * 0.044715 * x**2)
    cdf = (1 + torch.erf(x * math.sqrt(0.5))) * 0.5
    return value, cdf + x * torch.exp(x * x * -0.5) / math.sqrt(2 * math.pi)


def forward(x: Tensor, tanh: bool) -> Tensor:
    return gelu(wide(x), tanh)[0].to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    return (wide(dy) * gelu(wide(x), tanh)[1]).to(x.dtype).contiguous()
