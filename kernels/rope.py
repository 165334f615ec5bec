"""rope in Triton: queries and keys in one launch; the backward is the same kernel with the sine's sign turned.

One program takes some positions and up to HEADS heads of one batch, of the queries or of the keys: it reads the cosines
and sines of its positions once, widened to float32, keeps them in registers, and turns the pairs of one head after the
other by them. Reads q and k and writes q' and k', each once, and each table H / HEADS times, mostly from the L2 cache.
Channels past the rotated ones are copied. Any strides but the last are taken; outputs are stored as the inputs are,
head by head or position by position.

Pairs of halves are two loads of R/2 channels; interleaved pairs are one load of R, reshaped to (R/2, 2) and split,
which stays within a thread's registers. Su et al. 2021, arXiv:2104.09864.

Lost: heads as a dimension of the tile. The tables then reach the lanes through shared memory and a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, unit

PAIRS, WARPS = 1024, 4
"""Eight pairs of one head a thread: two 16-byte accesses of a 16-bit dtype."""
HEADS = 4
"""Heads that share a program's cosines and sines, where there are as many."""


@triton.jit
def _turn(
    x, y, cos, sin, first, h, positions, s, x_head, x_row, y_head, y_row,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one batch of x from the first on, turned into y; cos and sin are (POSITIONS, WIDTH)."""
    row = positions.to(tl.int64)[:, None]
    x += row * x_row
    y += row * y_row
    both = tl.arange(0, 2 * WIDTH)[None, :]
    half = tl.arange(0, WIDTH)[None, :]
    for i in tl.static_range(HEADS):
        head = first + i
        there = row < tl.where(head < h, s, 0)  # a scalar truth value in a mask fails in the interpreter
        source = x + head.to(tl.int64) * x_head
        sink = y + head.to(tl.int64) * y_head
        if INTERLEAVED:
            inside = there & (both < 2 * HALF)
            pairs = tl.load(source + both, mask=inside).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, (positions.shape[0], WIDTH, 2)))
            turned = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(sink + both, tl.reshape(turned, (positions.shape[0], 2 * WIDTH)), mask=inside)
        else:
            inside = there & (half < HALF)
            a = tl.load(source + half, mask=inside).to(tl.float32)
            b = tl.load(source + HALF + half, mask=inside).to(tl.float32)
            tl.store(sink + half, a * cos - b * sin, mask=inside)
            tl.store(sink + HALF + half, b * cos + a * sin, mask=inside)
        for start in tl.static_range(0, REST, 2 * WIDTH):
            place = 2 * HALF + start + both
            inside = there & (place < 2 * HALF + REST)
            tl.store(sink + place, tl.load(source + place, mask=inside), mask=inside)


@triton.jit
def _rope(
    q, q_out, k, k_out, cos, sin, sign, s, q_heads, k_heads,
    q_batch, q_head, q_row, qo_batch, qo_head, qo_row,
    k_batch, k_head, k_row, ko_batch, ko_head, ko_row, table_batch, table_row,
    HAS_K: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT: tl.constexpr,
    HEADS: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs count groups of heads (the queries', then the keys'), then positions, then batches."""
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups
    if HAS_K:
        groups += tl.cdiv(k_heads, HEADS)
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    blocks = tl.cdiv(s, POSITIONS)
    batch = (rest // blocks).to(tl.int64) * UNIT
    positions = rest % blocks * POSITIONS + tl.arange(0, POSITIONS)

    pair = tl.arange(0, WIDTH)[None, :]
    place = batch * table_batch + positions.to(tl.int64)[:, None] * UNIT * table_row + pair
    known = (positions[:, None] < s) & (pair < HALF)
    c = tl.load(cos + place, mask=known).to(tl.float32)
    t = tl.load(sin + place, mask=known).to(tl.float32) * sign
    if group < q_groups:
        _turn(
            q + batch * q_batch, q_out + batch * qo_batch, c, t, group * HEADS, q_heads, positions, s,
            q_head * UNIT, q_row * UNIT, qo_head * UNIT, qo_row * UNIT, HALF, REST, INTERLEAVED, HEADS, WIDTH,
        )  # fmt: skip
    elif HAS_K:
        _turn(
            k + batch * k_batch, k_out + batch * ko_batch, c, t, (group - q_groups) * HEADS, k_heads, positions, s,
            k_head * UNIT, k_row * UNIT, ko_head * UNIT, ko_row * UNIT, HALF, REST, INTERLEAVED, HEADS, WIDTH,
        )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    """An output stored as x is: head by head or position by position."""
    b, h, s, d = x.shape
    return empty((b, s, h, d), x).transpose(1, 2) if x.stride(1) < x.stride(2) else empty((b, h, s, d), x)


def _even(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, sign: float
) -> tuple[Tensor, Tensor]:
    b, h, s, d = q.shape
    half = cos.shape[-1]
    q_out, k_out = _like(q), empty((0,), q) if k is None else _like(k)
    q, cos, sin = _even(q), _even(cos), _even(sin)
    k = None if k is None else _even(k)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = [*q.stride()[:3], *q_out.stride()[:3]]
    strides += [0] * 6 if k is None else [*k.stride()[:3], *k_out.stride()[:3]]
    strides += [cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2)]
    step = unit(*strides)

    k_heads = 0 if k is None else k.shape[1]
    width = next_power_of_2(half)
    heads = min(next_power_of_2(max(h, k_heads)), HEADS)
    positions = min(next_power_of_2(s), max(PAIRS // width, 1))
    groups = cdiv(h, heads) + cdiv(k_heads, heads)
    launch(
        _rope, (groups * cdiv(s, positions) * b,), q, q_out, k, None if k is None else k_out, cos, sin,
        sign, s, h, k_heads, *[stride // step for stride in strides],
        HAS_K=k is not None, HALF=half, REST=d - 2 * half, INTERLEAVED=interleaved, UNIT=step, HEADS=heads,
        POSITIONS=positions, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return q_out, k_out


def forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin, interleaved, 1.0)


def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(dq, dk, cos, sin, interleaved, -1.0)
