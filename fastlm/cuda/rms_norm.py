"""forward() and backward() of rms_norm over the CUDA launchers, by way of _norm.py."""

from __future__ import annotations

from torch import Tensor

from fastlm.cuda import _norm


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, _, rstd = _norm.forward(x, residual, weight, None, eps, offset, False, seed, dropout)
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
    dx, dr, dw, _ = _norm.backward(dy, x, weight, None, rstd, dh, False, offset, seed, dropout)
    return dx, dr, dw
