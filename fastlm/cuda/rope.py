"""forward() and backward() of rope over the CUDA launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, nothing, output


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    b, _, s, d = q.shape
    if cos.dtype is not sin.dtype or cos.dtype not in DTYPES:
        cos, sin = cos.to(torch.float32), sin.to(torch.float32)
    _q, q_out, q_place = _place("q", q, q.dtype)  # _q may be a copy: kept until its kernel is started
    if k is None:
        k_out, k_place = nothing(q), _NO_KEYS
    else:
        _k, k_out, k_place = _place("k", k, q.dtype)
    _c, c_place = _table("cos", cos)
    _t, t_place = _table("sin", sin)
    extension().rope(
        DTYPES[q.dtype], *q_place, *k_place, DTYPES[cos.dtype], *c_place, *t_place,
        b, s, d, 2 * cos.shape[-1], interleaved, inverse, *lane(q),
    )  # fmt: skip
    return q_out, k_out


_NO_KEYS: tuple[int, ...] = (0,) * 9


def _place(name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x with a contiguous last dimension; an output stored as x is, head by head or position by position; what the
    launcher takes of both."""
    b, h, s, d = x.shape
    batch, head, position, channel = x.stride()
    out = empty((b, s, h, d), x).transpose(1, 2) if head < position else empty((b, h, s, d), x)
    if channel != 1:
        x = x.contiguous()
        batch, head, position, _ = x.stride()
    at = address(name, x, dtype, contiguous=False)
    return x, out, (at, batch, head, position, output(out), *out.stride()[:3], h)


def _table(name: str, table: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The table with a contiguous last dimension; its address, its strides over batches and positions."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    batch = table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0
    return table, (address(name, table, *DTYPES, contiguous=False), batch, table.stride(-2))


def forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin, interleaved, False)


def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(dq, dk, cos, sin, interleaved, True)
