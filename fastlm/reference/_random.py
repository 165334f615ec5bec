"""The random bits of dropout, as csrc/cpu/attention.h documents them and kernels/_random.py makes them."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def kept(seed: Tensor, dropout: float, rows: int, columns: Tensor) -> Tensor:
    """(rows, C), False where dropped; seed: one int64, columns: (C,), the numbers of the columns."""
    row = torch.arange(1, rows + 1, device=seed.device)
    z = seed.reshape(()) + row * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shift(z, 31)).view(rows, 1)
    u = (z & _WORD) ^ ((columns.long() * 0x9E3779B1) & _WORD)
    u = ((u ^ (u >> 16)) * 0x7FEB352D) & _WORD
    u = ((u ^ (u >> 15)) + _shift(z, 32)) & _WORD
    u = (u * 0x846CA68B) & _WORD
    return u ^ (u >> 16) >= min(int(dropout * 2**32), _WORD)


def dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """dropout(x) of x (..., N): kept elements divided by 1 - dropout, 0 elsewhere; x itself without a seed."""
    if seed is None:
        return x
    columns = torch.arange(x.shape[-1], device=x.device)
    keep = kept(seed, dropout, x.shape[:-1].numel(), columns).view(x.shape)
    return torch.where(keep, x / (1 - dropout), 0)
