"""forward() and backward() of rms_norm in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastlm.reference import _random, wide


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h = x
    if residual is not None:
        h = (_random.dropped(wide(x), seed, dropout) + wide(residual)).to(x.dtype)
    f = wide(h)
    rstd = (f.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = f * rstd
    if weight is not None:
        y = y * (weight.to(f.dtype) + offset)
    return y.to(x.dtype).contiguous(), (x.new_empty(0) if residual is None else h.contiguous()), rstd.flatten()


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
    n = x.shape[-1]
    f, g = wide(x).reshape(rstd.numel(), n), wide(dy).reshape(rstd.numel(), n)
    xhat = f * rstd[:, None]
    dw = (g * xhat).sum(0).to(weight.dtype) if weight is not None else f.new_empty(0)
    if weight is not None:
        g = g * (weight.to(f.dtype) + offset)
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[:, None]
    if dh is not None:
        dx = dx + wide(dh).reshape(dx.shape)
    dx = dx.reshape(x.shape)
    dr = x.new_empty(0) if seed is None else dx.to(x.dtype).contiguous()
    return _random.dropped(dx, seed, dropout).to(x.dtype).contiguous(), dr, dw
