"""forward() and backward() of dropout in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import _random, wide


def forward(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    y = _random.dropped(wide(x), seed, dropout)
    if residual is None:
        return y.to(x.dtype).contiguous()
    return (y + wide(residual)).to(residual.dtype).contiguous()


def backward(dy: Tensor, dtype: torch.dtype, seed: Tensor | None, dropout: float) -> Tensor:
    return _random.dropped(wide(dy), seed, dropout).to(dtype).contiguous()
