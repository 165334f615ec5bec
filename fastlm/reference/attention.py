"""forward() and backward() of attention in plain PyTorch. Holds S x T tensors; the kernels do not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import wide

_WORD = 0xFFFFFFFF


def like(x: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (*x.shape[:-1], size) with x's order of heads and positions: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, s, h, size), dtype=dtype).transpose(1, 2)
    return x.new_empty((b, h, s, size), dtype=dtype)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def kept(seed: Tensor, dropout: float, b: int, h: int, s: int, t: int) -> Tensor:
    """(B, H, S, T), False where dropped. Bit for bit the mask of csrc/cpu/attention.h, which documents the hash."""
    row = torch.arange(1, b * h * s + 1, device=seed.device)
    z = seed.reshape(()) + row * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shift(z, 31)).view(b, h, s, 1)
    u = (z & _WORD) ^ ((torch.arange(t, device=seed.device) * 0x9E3779B1) & _WORD)
    u = ((u ^ (u >> 16)) * 0x7FEB352D) & _WORD
    u = ((u ^ (u >> 15)) + _shift(z, 32)) & _WORD
    u = (u * 0x846CA68B) & _WORD
    return u ^ (u >> 16) >= min(int(dropout * 2**32), _WORD)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, causal: int, scale: float) -> tuple[Tensor, Tensor | None]:
    """Masked logits (B, Hk, G, S, T) and, where something may be masked, which keys each query sees."""
    (b, h, s, d), (hk, t) = q.shape, k.shape[1:3]
    x = wide(q).reshape(b, hk, h // hk, s, d) @ wide(k).unsqueeze(2).mT * scale
    seen = None
    if mask is not None:
        m = mask.expand(b, h, s, t).unflatten(1, (hk, h // hk))
        seen = m if m.dtype is torch.bool else m != -torch.inf
        x = x if m.dtype is torch.bool else x + m.to(x.dtype)
    if causal:
        diagonal = t - s if causal == 2 else 0
        below = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(diagonal)
        seen = below if seen is None else seen & below
    return (x if seen is None else x.masked_fill(~seen, -torch.inf)), seen


def _drop(p: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    if dropout == 0:
        return p
    assert seed is not None
    b, hk, g, s, t = p.shape
    return p * kept(seed, dropout, b, hk * g, s, t).view(p.shape) / (1 - dropout)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    (b, h, s, _), dv = q.shape, v.shape[-1]
    x, seen = _logits(q, k, mask, causal, scale)
    lse = x.logsumexp(-1)
    p = _drop((x - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp(), seed, dropout)
    vf = wide(v).unsqueeze(2)
    if seen is None:
        y = p @ vf
    else:  # 0 * NaN is NaN: a value that no query may see must not reach one
        fine = vf.isfinite()
        y = p @ vf.where(fine, 0)
        spoiled = seen.to(p.dtype).expand(p.shape) @ (~fine).to(p.dtype)
        y = y.masked_fill(spoiled > 0, torch.nan)
    out = like(q, dv)
    out.copy_(y.reshape(b, h, s, dv))
    return out, lse.reshape(b, h, s)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: int,
    scale: float,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, h, s, d), (hk, t) = q.shape, k.shape[1:3]
    groups = (b, hk, h // hk, s)
    x, seen = _logits(q, k, mask, causal, scale)
    p = (x - lse.masked_fill(lse == -torch.inf, torch.inf).view(groups).unsqueeze(-1)).exp()
    g = wide(dout).reshape(*groups, v.shape[-1])
    delta = (g * wide(out).reshape(g.shape)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.reshape(groups)
    delta = delta.masked_fill(lse.view(groups) == -torch.inf, 0)
    dp = _drop(g @ wide(v).unsqueeze(2).mT, seed, dropout)
    ds = p * (dp - delta.unsqueeze(-1))
    kf = wide(k).unsqueeze(2)
    if seen is not None:
        ds = ds.masked_fill(~seen, 0)
        kf = kf.where(kf.isfinite(), 0)
    dq, dk, dv = like(q, d), like(k, d), like(v, v.shape[-1])
    dq.copy_((ds @ kf * scale).reshape(q.shape))
    dk.copy_((ds.mT @ wide(q).reshape(*groups, d) * scale).sum(2))
    dv.copy_((_drop(p, seed, dropout).mT @ g).sum(2))
    if not needs_bias:
        return dq, dk, dv, lse.new_empty(0)
    assert mask is not None
    return dq, dk, dv, ds.reshape(b, h, s, t).sum_to_size(mask.shape).contiguous()
