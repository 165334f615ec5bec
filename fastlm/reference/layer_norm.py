"""forward() and backward() of layer_norm in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastlm.reference import _random, wide


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x
    if residual is not None:
        h = (_random.dropped(wide(x), seed, dropout) + wide(residual)).to(x.dtype)
    f = wide(h)
    mean = f.mean(-1, keepdim=True)
    mean = mean + (f - mean).mean(-1, keepdim=True)  # a large mean's float32 sum is off by several ulp
    rstd = ((f - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (f - mean) * rstd
    if weight is not None:
        y = y * weight.to(f.dtype)
    if bias is not None:
        y = y + bias.to(f.dtype)
    return (
        y.to(x.dtype).contiguous(),
        (x.new_empty(0) if residual is None else h.contiguous()),
        mean.flatten(),
        rstd.flatten(),
    )


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
    n = x.shape[-1]
    f, g = wide(x).reshape(mean.numel(), n), wide(dy).reshape(mean.numel(), n)
    xhat = (f - mean[:, None]) * rstd[:, None]
    dtype = f.dtype if weight is None else weight.dtype
    dw = (g * xhat).sum(0).to(dtype) if weight is not None else f.new_empty(0)
    db = g.sum(0).to(dtype) if needs_bias else f.new_empty(0, dtype=dtype)
    if weight is not None:
        g = g * weight.to(f.dtype)
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[:, None]
    if dh is not None:
        dx = dx + wide(dh).reshape(dx.shape)
    dx = dx.reshape(x.shape)
    dr = x.new_empty(0) if seed is None else dx.to(x.dtype).contiguous()
    return _random.dropped(dx, seed, dropout).to(x.dtype).contiguous(), dr, dw, db
