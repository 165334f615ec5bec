"""softmax and log_softmax in Triton.

Rows of up to LONGEST elements stay in registers: one program takes a tile of whole rows, several where N is small,
finds each row's largest element and the sum of exponentials, and writes. Reads x and writes y (backward: reads y and
dy, writes dx), each once. A longer row is read twice by one program, the second time mostly from the L2 cache: first
every lane keeps a largest element and a sum of its own (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867,
with one exponential an element), which are joined at the end; then the result is written.

Lost: the online form with one largest element for the block. It needs a reduction across the warps in every step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import rows
from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, unit
from fastlm.kernels._log_sum_exp import exp

ELEMENTS = 2048
"""Least elements of a tile: 16 a thread of four warps."""
LONGEST = {"forward": 32768, "backward": 16384}
"""Longest row in registers: 32 floats a thread of 32 warps; the backward holds two rows."""
STEP, STEP_WARPS = 8192, 16
"""Elements of a long row taken at once."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where a running maximum starts. Not -inf: the difference of two would be NaN in lanes that saw no number yet."""


@triton.jit
def _tile(m, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of this program's tile and whether they exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    return row, col, (row < m) & (col < n)


@triton.jit
def _forward(x, y, m, n, x_row, LOG: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, col, inside = _tile(m, n * UNIT, ROWS, WIDTH)
    value = tl.load(x + row * UNIT * x_row + col, mask=inside, other=-float("inf")).to(tl.float32)
    value = value - tl.max(value, 1)[:, None]
    total = tl.sum(exp(value), 1)
    if LOG:
        result = value - tl.log(total)[:, None]
    else:
        result = exp(value) * (1.0 / total)[:, None]
    tl.store(y + row * UNIT * n + col, result, mask=inside)


@triton.jit
def _backward(dy, y, dx, m, n, dy_row, LOG: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, col, inside = _tile(m, n * UNIT, ROWS, WIDTH)
    gradient = tl.load(dy + row * UNIT * dy_row + col, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + row * UNIT * n + col, mask=inside, other=0.0).to(tl.float32)
    if LOG:
        result = gradient - exp(value) * tl.sum(gradient, 1)[:, None]
    else:
        result = value * (gradient - tl.sum(value * gradient, 1)[:, None])
    tl.store(dx + row * UNIT * n + col, result, mask=inside)


@triton.jit
def _forward_long(x, y, n, x_row, LOG: tl.constexpr, UNIT: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * UNIT
    col = tl.arange(0, STEP)
    top = tl.full((STEP,), LOWEST, tl.float32)
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, n * UNIT, STEP):
        value = tl.load(x + row * x_row + start + col, mask=start + col < n * UNIT, other=-float("inf")).to(tl.float32)
        above = value - top
        e = exp(-tl.abs(above))
        total = tl.where(above > 0, total * e + 1.0, total + e)
        top = tl.maximum(top, value)
    largest = tl.max(top, 0)
    total = tl.sum(total * exp(top - largest), 0)
    log_total = tl.log(total)
    scale = 1.0 / total
    for start in range(0, n * UNIT, STEP):
        inside = start + col < n * UNIT
        value = tl.load(x + row * x_row + start + col, mask=inside).to(tl.float32) - largest
        if LOG:
            result = value - log_total
        else:
            result = exp(value) * scale
        tl.store(y + row * n + start + col, result, mask=inside)


@triton.jit
def _backward_long(dy, y, dx, n, dy_row, LOG: tl.constexpr, UNIT: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * UNIT
    col = tl.arange(0, STEP)
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, n * UNIT, STEP):
        inside = start + col < n * UNIT
        gradient = tl.load(dy + row * dy_row + start + col, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            total += gradient
        else:
            total += gradient * tl.load(y + row * n + start + col, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(total, 0)
    for start in range(0, n * UNIT, STEP):
        inside = start + col < n * UNIT
        gradient = tl.load(dy + row * dy_row + start + col, mask=inside).to(tl.float32)
        value = tl.load(y + row * n + start + col, mask=inside).to(tl.float32)
        if LOG:
            result = gradient - exp(value) * total
        else:
            result = value * (gradient - total)
        tl.store(dx + row * n + start + col, result, mask=inside)


def _start(name: str, source: Tensor, others: tuple[Tensor, ...], log: bool) -> None:
    """Starts a kernel on the rows of source, whose distance is an argument, and of others, which are contiguous."""
    m, n = source.shape
    step = unit(n, source.stride(0))
    size, source_row = n // step, source.stride(0) // step
    if n > LONGEST[name]:
        kernel = _forward_long if name == "forward" else _backward_long
        launch(
            kernel, (m,), source, *others, size, source_row, LOG=log, UNIT=step, STEP=STEP, num_warps=STEP_WARPS
        )  # fmt: skip
        return
    width = next_power_of_2(n)
    height = max(ELEMENTS // width, 1)
    launch(
        _forward if name == "forward" else _backward, (cdiv(m, height),), source, *others, m, size, source_row,
        LOG=log, UNIT=step, ROWS=height, WIDTH=width, num_warps=min(max(width // 512, 4), 32),
    )  # fmt: skip


def forward(x: Tensor, log: bool) -> Tensor:
    y = empty(x.shape, x)
    if y.numel():
        _start("forward", rows(x), (y,), log)
    return y


def backward(dy: Tensor, y: Tensor, log: bool) -> Tensor:
    dx = empty(y.shape, y)
    if y.numel():
        _start("backward", rows(dy), (y.contiguous(), dx), log)
    return dx
