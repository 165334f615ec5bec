"""embedding in Triton: a gather, and a sum over sorted ids that gives the same bits every time.

Forward: one program copies a tile of rows of the table. Reads ids and the rows named, writes y.

Backward: ids are sorted (torch.sort, stable, on the device), so that the places of one id are a run of sorted
positions; torch.searchsorted finds where each run starts. `_pieces` adds up, in float32, every PIECE positions that lie
within one run; `_rows` writes each row of dweight, as zeros or as the sum of the run's head, of its whole pieces and of
its tail, in this order. A run of any length is thus added by as many programs as it has pieces, and the one that writes
its row reads fewer than 2 PIECE rows of dy and one row for each piece. Reads dy once and writes dweight once; sorting,
the starts (8 bytes for each row of the table, written and read) and the partial sums (4 bytes for PIECE elements of dy)
come on top. No atomics, no host sync.

Lost: a gradient zeroed first and programs for the runs alone. It writes the touched rows twice, and zeros cost a
program that finds an empty run no reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import rows
from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, tile, unit

GATHER, WARPS = 4096, 4
"""Elements of a tile of the gather: four 16-byte accesses of a 16-bit dtype a thread, to hide the wait for the ids."""
PIECE, BYTES, WIDEST = 128, 8192, 1024
"""Sorted positions of a partial sum; bytes of dy added at once, four 16-byte loads a thread; columns of them, so many
that a row's sum is stored 16 bytes at a time."""
GROUP = 8
"""Rows of dweight that a program writes; where no id names one of them, as one tile of zeros."""


@triton.jit
def _forward(ids, weight, y, m, v, n, weight_row, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    across = tl.cdiv(n * UNIT, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)[None, :]
    index = tl.load(ids + row, mask=row < m, other=0).to(tl.int64)
    known = (index >= 0) & (index < v)
    source = (tl.where(known, index, 0) * UNIT)[:, None] * weight_row + col
    inside = (row < m)[:, None] & (col < n * UNIT)
    value = tl.load(weight + source, mask=inside & known[:, None], other=float("nan"))
    tl.store(y + (row * UNIT)[:, None] * n + col, value, mask=inside)


@triton.jit
def _add(total, order, dy, first, last, col, width, dy_row, UNIT: tl.constexpr, STEP: tl.constexpr):
    """total (STEP, COLS) plus the rows of dy that order names at positions first to last."""
    for start in range(first, last, STEP):
        place = start + tl.arange(0, STEP)
        row = tl.load(order + place, mask=place < last, other=0)
        inside = (place < last)[:, None] & (col < width)
        total += tl.load(dy + (row * UNIT)[:, None] * dy_row + col, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _pieces(
    dy, keys, order, partial, v, n, padding, dy_row,
    UNIT: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sum over piece number `piece` of the sorted positions, where one id fills it; else nothing."""
    across = tl.cdiv(n * UNIT, COLS)
    piece = (tl.program_id(0) // across).to(tl.int64)
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)[None, :]
    key = tl.load(keys + piece * PIECE)
    if (key == tl.load(keys + piece * PIECE + PIECE - 1)) & (key >= 0) & (key < v) & (key != padding):
        total = tl.zeros((STEP, COLS), tl.float32)
        total = _add(total, order, dy, piece * PIECE, piece * PIECE + PIECE, col, n * UNIT, dy_row, UNIT, STEP)
        at = tl.arange(0, COLS) + tl.program_id(0) % across * COLS
        tl.store(partial + piece * UNIT * n + at, tl.sum(total, 0), mask=at < n * UNIT)


@triton.jit
def _rows(
    dy, starts, order, partial, dweight, v, n, padding, dy_row,
    UNIT: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(n * UNIT, COLS)
    first = (tl.program_id(0) // across).to(tl.int64) * GROUP
    at = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    col = at[None, :]
    begin = tl.load(starts + first)
    if begin == tl.load(starts + tl.minimum(first + GROUP, v)):
        empty_rows = first + tl.arange(0, GROUP)[:, None]
        zeros = tl.zeros((GROUP, COLS), dweight.dtype.element_ty)
        tl.store(dweight + empty_rows * UNIT * n + col, zeros, mask=(empty_rows < v) & (col < n * UNIT))
    else:
        for row in range(first, tl.minimum(first + GROUP, v)):
            end = tl.load(starts + row + 1)
            last = tl.where(row == padding, begin, end)
            head = tl.minimum(last, tl.cdiv(begin, PIECE) * PIECE)
            tail = tl.maximum(head, last // PIECE * PIECE)
            total = tl.zeros((STEP, COLS), tl.float32)
            total = _add(total, order, dy, begin, head, col, n * UNIT, dy_row, UNIT, STEP)
            for piece in range(head // PIECE, tail // PIECE, STEP):
                number = piece + tl.arange(0, STEP)[:, None]
                inside = (number < tail // PIECE) & (col < n * UNIT)
                total += tl.load(partial + number.to(tl.int64) * UNIT * n + col, mask=inside, other=0.0)
            total = _add(total, order, dy, tail, last, col, n * UNIT, dy_row, UNIT, STEP)
            tl.store(dweight + row * UNIT * n + at, tl.sum(total, 0), mask=at < n * UNIT)
            begin = end


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    (v, n), m = weight.shape, ids.numel()
    y = empty((*ids.shape, n), weight)
    if y.numel():
        table = rows(weight)
        step = unit(n, table.stride(0))
        height, width = tile(n, GATHER)
        launch(
            _forward, (cdiv(m, height) * cdiv(n, width),), ids.contiguous(), table, y, m, v, n // step,
            table.stride(0) // step, UNIT=step, ROWS=height, COLS=width, num_warps=WARPS,
        )  # fmt: skip
    return y


def backward(dy: Tensor, ids: Tensor, classes: int, padding_idx: int) -> Tensor:
    n, m = dy.shape[-1], ids.numel()
    dweight = empty((classes, n), dy)
    if m == 0 or dweight.numel() == 0:
        return dweight.zero_()
    # Ids out of range come first and last. int32 keys halve the passes of the sort.
    keys, order = torch.sort(ids.reshape(-1).clamp(-1, classes).to(torch.int32), stable=True)
    bounds = torch.arange(classes + 1, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(keys, bounds, out_int32=True)
    partial = empty((m // PIECE, n), dy, torch.float32)
    gradient = rows(dy)
    step = unit(n, gradient.stride(0))
    width = min(next_power_of_2(n), WIDEST)
    across = cdiv(n, width)
    sizes = (classes, n // step, padding_idx, gradient.stride(0) // step)
    options = {
        "UNIT": step,
        "PIECE": PIECE,
        "STEP": min(BYTES // dy.itemsize // width, 64),
        "COLS": width,
        "num_warps": WARPS,
    }
    launch(_pieces, (m // PIECE * across,), gradient, keys, order, partial, *sizes, **options)
    launch(
        _rows, (cdiv(classes, GROUP) * across,), gradient, starts, order, partial, dweight, *sizes,
        GROUP=GROUP, **options,
    )  # fmt: skip
    return dweight
