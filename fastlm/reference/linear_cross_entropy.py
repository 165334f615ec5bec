"""forward() and backward() of linear_cross_entropy in plain PyTorch: all logits at once, in the wide dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import cross_entropy, wide


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    w = wide(weight.to(hidden.dtype))
    b = None if bias is None else wide(bias.to(hidden.dtype))
    return torch.nn.functional.linear(wide(hidden), w, b)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        options = (class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap)
        logits = _logits(hidden, weight, bias)
        loss, stats, _ = cross_entropy.forward(logits, target, *options, False, None)
        if not any(needs):
            return loss, stats, hidden.new_empty(0), stats.new_empty(0), stats.new_empty(0)
        one = loss.new_ones(())
        return loss, stats, *backward(one, hidden, weight, bias, target, *options, stats, needs)


def backward(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        options = (class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap)
        d = cross_entropy.backward(dy, _logits(hidden, weight, bias), target, *options, stats, None)
        dhidden = (d @ wide(weight.to(hidden.dtype))).to(hidden.dtype) if needs[0] else hidden.new_empty(0)
        dweight = d.T @ wide(hidden) if needs[1] else stats.new_empty(0)
        return dhidden, dweight.contiguous(), d.sum(0) if needs[2] else stats.new_empty(0)
