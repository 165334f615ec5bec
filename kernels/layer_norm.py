"""forward() and backward() of layer_norm in Triton; the kernels and what they cost stand in _norm.py."""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels import _norm


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h, mean, rstd = _norm.forward(x, residual, weight, bias, eps, None, True, seed, dropout)
    assert mean is not None
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    needs_bias: bool,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm.backward(dy, x, weight, mean, rstd, dh, needs_bias, None, seed, dropout)
