"""kl_div in Triton: KL(softmax(x) || softmax(y)) of rows of logits, x the teacher's and y the student's, or in reverse.

Forward: one program takes WIDEST columns of one row of both (several whole rows where V is small) and reduces them, in
registers, to the largest elements X and Y, the sums of exp(x - X) and exp(y - Y), and the sum of
exp(x - X) ((x - X) - (y - Y)): every element is read once and costs one exponential. `_join` brings the pieces of a row
to common X and Y (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867) and writes its loss and statistics.
Backward: element by element from the statistics. Reads both logits in either direction and writes dlogits; the pieces
are 40 bytes for WIDEST columns of a row. Differences are taken between elements that had their row's largest taken off,
so that a teacher and a student far apart lose no digits. Hinton, Vinyals and Dean 2015, arXiv:1503.02531.

Lost: one program a row with a loop. Rows are then waited for one step after the other, and short batches leave
multiprocessors without one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import rows
from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, tile, unit
from fastlm.kernels._log_sum_exp import exp, finite_or_zero

WIDEST, ELEMENTS, WARPS = 4096, 2048, 8
"""Columns that a program reduces at most, 16 of each matrix a thread; elements of its tile at least."""
BACKWARD, BACKWARD_WARPS = 1024, 4
"""Elements of a tile of the backward: eight a thread."""
JOINED = 1024
"""Pieces that a program of _join takes, of as many rows as that makes."""
INF = tl.constexpr(float("inf"))


@triton.jit
def _write(
    loss, stats, row, m, top_x, sum_x, top_y, sum_y, weighted, mask, HAS_MASK: tl.constexpr, REVERSE: tl.constexpr
):
    """Statistics and loss of rows from their sums; rows are (ROWS,)."""
    inside = row < m
    log_x = tl.log(sum_x)
    log_y = tl.log(sum_y)
    value = weighted / sum_x - log_x + log_y
    x_at = 0 if REVERSE else 2  # the student's come first
    tl.store(stats + x_at * m + row, top_x, mask=inside)
    tl.store(stats + (x_at + 1) * m + row, log_x, mask=inside)
    tl.store(stats + (2 - x_at) * m + row, top_y, mask=inside)
    tl.store(stats + (3 - x_at) * m + row, log_y, mask=inside)
    tl.store(stats + 4 * m + row, value, mask=inside)
    if HAS_MASK:
        value = tl.where(tl.load(mask + row, mask=inside, other=0) != 0, value, 0.0)
    tl.store(loss + row, value, mask=inside)


@triton.jit
def _forward(
    x, y, pieces, loss, stats, mask, inverse_temperature, m, v, x_row, y_row,
    HAS_MASK: tl.constexpr, REVERSE: tl.constexpr, SINGLE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(v * UNIT, WIDTH)
    piece = tl.program_id(0) % across
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = piece * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < m)[:, None] & (col < v * UNIT)
    at = (row * UNIT)[:, None]
    a = tl.load(x + at * x_row + col, mask=inside, other=-INF).to(tl.float32) * inverse_temperature
    b = tl.load(y + at * y_row + col, mask=inside, other=-INF).to(tl.float32) * inverse_temperature
    top_x = tl.max(a, 1)
    top_y = tl.max(b, 1)
    a -= finite_or_zero(top_x)[:, None]
    b -= finite_or_zero(top_y)[:, None]
    e = exp(a)
    sum_x = tl.sum(e, 1)
    sum_y = tl.sum(exp(b), 1)
    weighted = tl.sum(tl.where(e == 0.0, 0.0, e * (a - b)), 1)
    if SINGLE:
        _write(loss, stats, row, m, top_x, sum_x, top_y, sum_y, weighted, mask, HAS_MASK, REVERSE)
    else:
        place = pieces + row * 5 * across + piece
        tl.store(place, top_x, mask=row < m)
        tl.store(place + across, sum_x, mask=row < m)
        tl.store(place + 2 * across, top_y, mask=row < m)
        tl.store(place + 3 * across, sum_y, mask=row < m)
        tl.store(place + 4 * across, weighted, mask=row < m)


@triton.jit
def _join(
    pieces, loss, stats, mask, m, across,
    HAS_MASK: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)[None, :]
    inside = (row < m)[:, None] & (col < across)
    place = pieces + (row * 5)[:, None] * across + col
    tops_x = tl.load(place, mask=inside, other=-INF)
    sums_x = tl.load(place + across, mask=inside, other=0.0)
    tops_y = tl.load(place + 2 * across, mask=inside, other=-INF)
    sums_y = tl.load(place + 3 * across, mask=inside, other=0.0)
    weighted = tl.load(place + 4 * across, mask=inside, other=0.0)
    top_x = tl.max(tops_x, 1)
    top_y = tl.max(tops_y, 1)
    a = tops_x - finite_or_zero(top_x)[:, None]
    b = tops_y - finite_or_zero(top_y)[:, None]
    e = exp(a)
    sum_x = tl.sum(sums_x * e, 1)
    sum_y = tl.sum(sums_y * exp(b), 1)
    weighted = tl.sum(tl.where(e == 0.0, 0.0, e * (weighted + sums_x * (a - b))), 1)
    _write(loss, stats, row, m, top_x, sum_x, top_y, sum_y, weighted, mask, HAS_MASK, REVERSE)


@triton.jit
def _backward(
    logits, target, dlogits, scale, mask, stats, inverse_temperature, m, v, logits_row, target_row, scale_row,
    HAS_MASK: tl.constexpr, REVERSE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(v * UNIT, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    there = row < m
    inside = there[:, None] & (col < v * UNIT)
    at = (row * UNIT)[:, None]
    a = tl.load(logits + at * logits_row + col, mask=inside).to(tl.float32) * inverse_temperature
    b = tl.load(target + at * target_row + col, mask=inside).to(tl.float32) * inverse_temperature
    a = a - tl.load(stats + row, mask=there)[:, None] - tl.load(stats + m + row, mask=there)[:, None]
    b = b - tl.load(stats + 2 * m + row, mask=there)[:, None] - tl.load(stats + 3 * m + row, mask=there)[:, None]
    q = exp(a)
    if REVERSE:
        d = tl.where(q == 0.0, 0.0, q * (a - b - tl.load(stats + 4 * m + row, mask=there)[:, None]))
    else:
        d = q - exp(b)
    d *= (tl.load(scale + row * scale_row, mask=there).to(tl.float32) * inverse_temperature)[:, None]
    if HAS_MASK:
        d = tl.where((tl.load(mask + row, mask=there, other=0) != 0)[:, None], d, 0.0)
    tl.store(dlogits + at * v + col, d, mask=inside)


def _strides(x: Tensor, y: Tensor) -> tuple[int, list[int]]:
    """The unit of sizes, and in it V and the distances between rows."""
    step = unit(x.shape[1], x.stride(0), y.stride(0))
    return step, [size // step for size in (x.shape[1], x.stride(0), y.stride(0))]


def forward(
    logits: Tensor, target: Tensor, mask: Tensor | None, temperature: float, reduction: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    loss, stats = (empty(s, logits, torch.float32) for s in (shape, (5, shape.numel())))
    x, y = (rows(t) for t in ((logits, target) if reverse else (target, logits)))
    (m, v), (step, sizes) = x.shape, _strides(x, y)
    width = min(next_power_of_2(v), WIDEST)
    height, across = max(ELEMENTS // width, 1), cdiv(v, width)
    pieces = None if across == 1 else empty((m, 5, across), logits, torch.float32)
    flags = {"HAS_MASK": mask is not None, "REVERSE": reverse}
    if mask is not None:
        mask = mask.contiguous()
    launch(
        _forward, (cdiv(m, height) * across,), x, y, pieces, loss, stats, mask, 1.0 / temperature, m, *sizes,
        **flags, SINGLE=across == 1, UNIT=step, ROWS=height, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    if pieces is not None:
        width = next_power_of_2(across)
        height = max(JOINED // width, 1)
        launch(
            _join, (cdiv(m, height),), pieces, loss, stats, mask, m, across,
            **flags, ROWS=height, WIDTH=width, num_warps=4,
        )  # fmt: skip
    if reduction == "none":
        return loss, stats
    total = loss.sum()
    if reduction == "batchmean":
        total = total / (m if mask is None else mask.sum())
    return total, stats


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    reduction: str,
    reverse: bool,
) -> Tensor:
    dlogits = empty(logits.shape, logits)
    x, y = rows(logits), rows(target)
    (m, v), (step, sizes) = x.shape, _strides(x, y)
    if reduction == "batchmean":
        dy = dy / (m if mask is None else mask.sum())
    scale = dy.reshape(-1)
    height, width = tile(v, BACKWARD)
    launch(
        _backward, (cdiv(m, height) * cdiv(v, width),), x, y, dlogits, scale,
        None if mask is None else mask.contiguous(), stats, 1.0 / temperature, m, *sizes,
        scale.stride(0) if reduction == "none" else 0,
        HAS_MASK=mask is not None, REVERSE=reverse, UNIT=step, ROWS=height, WIDTH=width, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dlogits
