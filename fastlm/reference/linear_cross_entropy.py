"""forward() and backward() of linear_cross_entropy in plain PyTorch: all logits at once, in the wide dtype, for either
implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.reference import cross_entropy, wide

FILTER_TILE = {2: 128, 4: 64, 8: 64}
"""Rows and classes that gradient_filter keeps or drops together, by the bytes of hidden's dtype."""


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    w = wide(weight.to(hidden.dtype))
    b = None if bias is None else wide(bias.to(hidden.dtype))
    return torch.nn.functional.linear(wide(hidden), w, b)


def _matters(z: Tensor, target: Tensor, ignore_index: int, least: float, t: int) -> Tensor:
    """(M, V) bool: whether some |softmax(z) - onehot| in the element's tile of t x t is at least `least`."""
    kept, label, _ = cross_entropy.labels(z, target, None, ignore_index)
    onehot = torch.zeros_like(z).scatter_(1, label[:, None], 1.0)
    off = torch.where(kept[:, None], (z.softmax(1) - onehot).abs(), 0)
    m, v = z.shape
    off = torch.nn.functional.pad(off, (0, -v % t, 0, -m % t))
    tiles = off.unflatten(0, (-1, t)).unflatten(2, (-1, t)).amax((1, 3)) >= least
    return tiles.repeat_interleave(t, 0).repeat_interleave(t, 1)[:m, :v]


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
    implementation: str,
    gradient_filter: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        options = (class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap)
        logits = _logits(hidden, weight, bias)
        loss, stats, _ = cross_entropy.forward(logits, target, *options, False, None)
        if not any(needs):
            return loss, stats, hidden.new_empty(0), stats.new_empty(0), stats.new_empty(0)
        one = loss.new_ones(())
        inputs = (one, hidden, weight, bias, target, *options, implementation, gradient_filter, stats, needs)
        return loss, stats, *_gradients(*inputs)


def backward(
    dy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = _gradients(dy, hidden, weight, bias, *rest)
    return dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _gradients(
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
    implementation: str,
    gradient_filter: float | None,
    stats: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        options = (class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap)
        logits = _logits(hidden, weight, bias)
        d = cross_entropy.backward(dy, logits, target, *options, stats, None)
        if gradient_filter is not None:
            z, tile = cross_entropy.capped(logits, softcap), FILTER_TILE[hidden.itemsize]
            d = d.where(_matters(z, target, ignore_index, gradient_filter, tile), 0)
        dhidden = (d @ wide(weight.to(hidden.dtype))).to(hidden.dtype) if needs[0] else hidden.new_empty(0)
        dweight = d.T @ wide(hidden) if needs[1] else stats.new_empty(0)
        return dhidden, dweight.contiguous(), d.sum(0) if needs[2] else stats.new_empty(0)
