"""forward() and backward() of rope in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import wide


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) rotated by the angles of cos and sin, stored as x is: head by head or position by position."""
    f, r = wide(x), 2 * cos.shape[-1]
    c, s = (t.to(f.dtype) if t.dim() == 2 else t.to(f.dtype)[:, None] for t in (cos, sin))
    if interleaved:
        a, b = f[..., 0:r:2], f[..., 1:r:2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = f[..., : r // 2], f[..., r // 2 : r]
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    out = torch.cat((turned, f[..., r:]), -1).to(x.dtype)
    if x.stride(1) < x.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin, interleaved), q.new_empty(0) if k is None else rotate(k, cos, sin, interleaved)


def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return forward(dq, dk, cos, -sin, interleaved)
