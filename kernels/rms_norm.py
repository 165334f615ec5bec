"""forward() and backward() of rms_norm in Triton; the kernels and what they cost stand in _norm.py."""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels import _norm


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, _, rstd = _norm.forward(x, residual, weight, None, eps, offset or None, False, seed, dropout)
    return y, h, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dr, dw, _ = _norm.backward(dy, x, weight, None, rstd, dh, False, offset or None, seed, dropout)
    return dx, dr, dw
