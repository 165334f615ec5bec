"""forward() and backward() of rope over the CUDA launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, nothing, output


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    b, h, s, d = q.shape
    _q, q_out, q_place = _place("q", q, dtype, b, h, s, d)  # _q may be a copy: kept until its kernel is started
    if k is None:
        k_out, k_place = nothing(q), _NO_KEYS
    else:
        _k, k_out, k_place = _place("k", k, dtype, b, k.shape[1], s, d)

    table = cos.dtype
    if sin.dtype is not table or table not in DTYPES:
        table = torch.float32
        cos, sin = cos.to(table), sin.to(table)
    strides = cos.stride()
    if strides[-1] != 1 or sin.stride() != strides:
        cos, sin = cos.contiguous(), sin.contiguous()
        strides = cos.stride()
    shape = cos.shape
    extension().rope(
        DTYPES[dtype], *q_place, *k_place, DTYPES[table],
        address("cos", cos, table, contiguous=False), address("sin", sin, table, contiguous=False),
        strides[0] if len(shape) == 3 and shape[0] > 1 else 0, strides[-2], b, s, d, 2 * shape[-1],
        interleaved, inverse, *lane(q),
    )  # fmt: skip
    return q_out, k_out


_Place = tuple[int, int, int, int, int, bool, int]
_NO_KEYS: _Place = (0, 0, 0, 0, 0, False, 0)


def _place(
    name: str, x: Tensor, dtype: torch.dtype, b: int, h: int, s: int, d: int
) -> tuple[Tensor, Tensor, _Place]:  # fmt: skip
    """x with a contiguous last dimension; an output stored as x is, head by head or position by position; what the
    launcher takes of both."""
    batch, head, position, channel = x.stride()
    by_position = head < position
    out = empty((b, h, s, d), x, None, (s * h * d, d, h * d, 1) if by_position else None)
    if channel != 1:
        x = x.contiguous()
        batch, head, position, _ = x.stride()
    return x, out, (
        address(name, x, dtype, contiguous=False), batch, head, position, output(out), by_position, h,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin, interleaved, False)


def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(dq, dk, cos, sin, interleaved, True)
