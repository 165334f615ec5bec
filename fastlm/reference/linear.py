"""forward() and backward() of linear: torch's own products, in the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._walk import outer, rows


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wide: bool, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stat = torch.float64 if x.dtype is torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        dy = rows(dy)
        dx = (dy @ weight).view(x.shape) if needs_x else x.new_empty(0)
        dweight = outer(dy, rows(x), weight) if needs_weight else x.new_empty(0)
        dbias = dy.sum(0, dtype=stat) if needs_bias else x.new_empty(0, dtype=stat)
        return dx, dweight.to(stat) if wide else dweight, dbias
