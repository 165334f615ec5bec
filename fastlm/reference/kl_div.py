"""forward() and backward() of kl_div in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import wide


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of rows given by their log probabilities: sum of e^p (p - q), 0 where e^p is 0."""
    weight = p.exp()
    return torch.where(weight == 0, 0, weight * (p - q)).sum(-1)


def forward(
    logits: Tensor, target: Tensor, mask: Tensor | None, temperature: float, reduction: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    f = wide(logits)
    pair = [x.flatten(0, -2) / temperature if x.dim() > 1 else x[None] / temperature for x in (f, target.to(f.dtype))]
    tops = [x.amax(-1) for x in pair]
    pair = [x - top[:, None] for x, top in zip(pair, tops, strict=True)]
    sums = [x.exp().sum(-1).log() for x in pair]
    q, p = (x - log_sum[:, None] for x, log_sum in zip(pair, sums, strict=True))
    loss = divergence(q, p) if reverse else divergence(p, q)
    stats = torch.stack([tops[0], sums[0], tops[1], sums[1], loss])
    loss = loss.reshape(logits.shape[:-1])
    if mask is not None:
        loss = torch.where(mask, loss, 0)
    if reduction == "none":
        return loss.contiguous(), stats
    loss = loss.sum()
    if reduction == "batchmean":
        loss = loss / (logits.shape[:-1].numel() if mask is None else mask.sum())
    return loss, stats


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    reduction: str,
    reverse: bool,
) -> Tensor:
    f = wide(logits)
    top, log_sum, target_top, target_log_sum, loss = stats.reshape(5, *logits.shape[:-1], 1)
    q = f / temperature - top - log_sum
    p = target.to(f.dtype) / temperature - target_top - target_log_sum
    if reverse:
        d = torch.where(q.exp() == 0, 0, q.exp() * (q - p - loss))
    else:
        d = q.exp() - p.exp()
    scale = dy.to(f.dtype) / temperature
    if reduction == "batchmean":
        scale = scale / (logits.shape[:-1].numel() if mask is None else mask.sum())
    d = d * scale.expand(logits.shape[:-1])[..., None]
    if mask is not None:
        d = torch.where(mask[..., None], d, 0)
    return d.to(logits.dtype).contiguous()
