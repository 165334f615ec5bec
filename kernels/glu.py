"""swiglu and geglu in Triton.

gate and up are (M, N) with any distance between rows, so the packed form (gate and up side by side in one row) and the
halves of one product are read where they lie. One program takes a tile of rows x columns: load both, widen to float32,
compute, round, store. Reads gate and up and writes y (backward: reads dy, gate and up, writes dgate and dup, side by
side for the packed form), each once. Shazeer 2020, arXiv:2002.05202.

Rows are cut at a power of two that divides N where one of at least 128 does, so that no lane idles: 43 pieces of 256
for N = 11008, not 10.75 of 1024.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import rows
from fastlm.kernels._activation import activate
from fastlm.kernels._launch import cdiv, empty, launch, tile, unit

BLOCK, WARPS = 1024, 4
"""Eight elements a thread of each tensor: one 16-byte access of a 16-bit dtype, two of float32."""


@triton.jit
def _place(m, n, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows times UNIT and columns of this program's tile, and whether they exist; neighbours in a row come first."""
    across = tl.cdiv(n, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)[None, :]
    return row * UNIT, col, (row < m) & (col < n)


@triton.jit
def _forward(
    gate, up, y, gate_row, up_row, m, n,
    PACKED: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, inside = _place(m, n * UNIT, UNIT, ROWS, COLS)
    if PACKED:
        up = gate + n * UNIT
        up_row = gate_row
    a = tl.load(gate + row * gate_row + col, mask=inside).to(tl.float32)
    b = tl.load(up + row * up_row + col, mask=inside).to(tl.float32)
    value, _ = activate(a, ACTIVATION, gate.dtype.element_ty == tl.float32)
    tl.store(y + row * n + col, value * b, mask=inside)


@triton.jit
def _backward(
    dy, gate, up, dgate, dup, dy_row, gate_row, up_row, m, n,
    PACKED: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, inside = _place(m, n * UNIT, UNIT, ROWS, COLS)
    out_row = n
    if PACKED:
        up = gate + n * UNIT
        up_row = gate_row
        dup = dgate + n * UNIT
        out_row = 2 * n
    gradient = tl.load(dy + row * dy_row + col, mask=inside).to(tl.float32)
    a = tl.load(gate + row * gate_row + col, mask=inside).to(tl.float32)
    b = tl.load(up + row * up_row + col, mask=inside).to(tl.float32)
    value, slope = activate(a, ACTIVATION, gate.dtype.element_ty == tl.float32)
    tl.store(dgate + row * out_row + col, gradient * b * slope, mask=inside)
    tl.store(dup + row * out_row + col, gradient * value, mask=inside)


def _sizes(n: int, *matrices: Tensor | None) -> tuple[list[int], int]:
    """The distance between the rows of each matrix (0 for None) and n, counted in units, and the unit."""
    strides = [0 if x is None else x.stride(0) for x in matrices]
    step = unit(n, *strides)
    return [size // step for size in (*strides, n)], step


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    n = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    y = empty((*gate.shape[:-1], n), gate)
    a, b = rows(gate), None if up is None else rows(up)
    (a_row, b_row, size), step = _sizes(n, a, b)
    height, width = tile(n, BLOCK)
    launch(
        _forward, (cdiv(a.shape[0], height) * cdiv(n, width),), a, b, y, a_row, b_row, a.shape[0], size,
        PACKED=b is None, ACTIVATION=activation, UNIT=step, ROWS=height, COLS=width, num_warps=WARPS,
    )  # fmt: skip
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    n = dy.shape[-1]
    dgate = empty(gate.shape, gate)
    dup = empty((0,) if up is None else up.shape, gate)
    g, a, b = rows(dy), rows(gate), None if up is None else rows(up)
    (g_row, a_row, b_row, size), step = _sizes(n, g, a, b)
    height, width = tile(n, BLOCK)
    launch(
        _backward, (cdiv(a.shape[0], height) * cdiv(n, width),),
        g, a, b, dgate, None if b is None else dup, g_row, a_row, b_row, a.shape[0], size,
        PACKED=b is None, ACTIVATION=activation, UNIT=step, ROWS=height, COLS=width, num_warps=WARPS,
    )  # fmt: skip
    return dgate, dup
