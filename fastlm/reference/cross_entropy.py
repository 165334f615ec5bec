"""forward() and backward() of cross_entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import wide


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def labels(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """kept (M,) bool, the label or 0 where ignored (M,), and the row's weight, 0 where ignored (M,).

    A label out of range raises on the CPU. On other devices that would need a host sync: the row's weight is NaN.
    """
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= logits.shape[1]))
    if target.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    label = torch.where(kept & ~wrong, target, 0)
    row = torch.ones_like(label, dtype=logits.dtype) if weight is None else weight.to(logits.dtype)[label]
    return kept, label, torch.where(kept, row, 0).masked_fill(wrong, float("nan"))


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_grad: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    f = wide(logits)
    z = capped(f, softcap)
    kept, label, row = labels(f, target, weight, ignore_index)
    logp = z.log_softmax(1)
    loss = -row * (1 - label_smoothing) * logp.gather(1, label[:, None])[:, 0]
    if label_smoothing:
        each = logp if weight is None else logp * weight.to(f.dtype)
        loss = loss - label_smoothing / z.shape[1] * each.sum(1)
    if z_loss:
        loss = loss + z_loss * row * z.logsumexp(1).square()
    loss = torch.where(kept, loss, 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / row.sum()
    top = z.amax(1)
    log_sum = (z - top[:, None]).exp().sum(1).log()
    stats = torch.stack([top, log_sum, -torch.expm1(logp.gather(1, label[:, None])[:, 0])])
    if not needs_grad:
        return loss, stats, logits.new_empty(0)
    one = loss.new_ones(())
    dlogits = backward(
        one, logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, stats, out
    )
    return loss, stats, dlogits


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    f = wide(logits)
    z = capped(f, softcap)
    kept, label, row = labels(f, target, weight, ignore_index)
    top, log_sum = stats[0], stats[1]
    share = label_smoothing / max(z.shape[1], 1)
    total = float(z.shape[1]) if weight is None else weight.to(f.dtype).sum()
    pull = row * (1 - label_smoothing)
    push = pull + share * total + 2 * z_loss * row * (top + log_sum)
    d = push[:, None] * (z - top[:, None] - log_sum[:, None]).exp()
    d = d.scatter_add(1, label[:, None], -pull[:, None])
    if label_smoothing:
        d = d - share * (1 if weight is None else weight.to(f.dtype))
    if softcap is not None:
        d = d * (1 - (z / softcap).square())
    scale = dy.to(f.dtype) / row.sum() if reduction == "mean" else dy.to(f.dtype)
    d = torch.where(kept[:, None], d * scale.expand(kept.shape)[:, None], 0).to(logits.dtype)
    if out is None:
        return d.contiguous()
    out.copy_(d)
    return logits.new_empty(0)
