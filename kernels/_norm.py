"""layer_norm and rms_norm in Triton, with the addition of a residual and its dropout: one set of kernels, in which
rms_norm is the case without a mean.

Forward     a row in registers: its mean, then the sum of the deviations, which corrects the mean, and that of their
            squares (columns behind the end deviate by 0), then y with the parameters from the cache.
Backward    a program goes through its rows and keeps dweight and dbias as float32 sums in registers, while the next
            rows are on their way to shared memory; it leaves one part, and a second kernel adds the parts in order.
Long rows   above REGISTERS go in pieces, twice: statistics lane by lane (Welford 1962) or the two sums of the backward,
            then the row again from the cache. dweight and dbias are a kernel of their own there.
Bytes       forward: x (and residual) read, y (and h) written, once. backward: x, dy (and dh) read and dx (and with
            dropout dresidual) written, once; long rows read x and dy once more for dweight and dbias. Parts: four rows
            of float32 for each multiprocessor at most, which stay in the L2 cache.
Parallel    tiles of whole rows, many narrow ones or one wide one; backward: as many programs as fit at once.
Papers      Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.

What bounds it: at 4.8 TB/s and some 0.8 us of latency each of the 132 multiprocessors of an H200 needs 29 KB on their
way at all times. 64 bytes a thread and the registers below give 40 to 64 KB forward (programs take turns between
memory and sums), and the two stages ahead of the backward's loop 64 KB. Not measured on a GPU yet.

Tried and lost, by what the compiler makes of it for sm_90: parameters loaded first (4096 bfloat16: 96 registers, 71
when loaded after the sums: 7 programs a multiprocessor, not 5); a row of 32768 forward (59 spills) and of 16384
backward (87 spills with both sums, 15 with one; none only with x, dy and the weight in shared memory, which the pair of
kernels does not need); the backward's two sums one after the other (2 barriers a tile and up to 23 registers more than
joined), but the forward's joined (20 spills on sm_100); N as an argument (loads of 4 bytes for widths like 1000,
registers for columns that do not exist).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import rows
from fastlm.kernels._launch import Target, cdiv, empty, launch, next_power_of_2, nothing, target
from fastlm.kernels._random import kept, row_keys, threshold

F32 = torch.float32
REGISTERS = 8192
"""The longest row that is held in registers."""
WIDE_BYTES, WIDE_WARPS, WIDE_STAGES = 8192, 8, 3
"""Pieces of a longer one: what two stages of them take stays below the 99 KiB of shared memory of small GPUs."""
COLUMNS, COLUMN_ROWS, COLUMN_WARPS = 1024, 2, 4


# --- on the device ---------------------------------------------------------------------------------------------------


@triton.jit
def _stride(given, N: tl.constexpr):
    """The distance between rows; None stands for N, whose divisors the compiler knows."""
    if given is None:
        return N
    else:
        return given


@triton.jit
def _tile(row, column, M, N: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of the tile exist; the columns need no look where N fills the block."""
    inside = (row < M)[:, None]
    if N < BLOCK:
        inside = inside & (column < N)[None, :]
    return inside


@triton.jit
def _parameter(pointer, column, offset, N: tl.constexpr):
    """A piece of weight or bias in float32, 0 behind the end."""
    value = tl.load(pointer + column, mask=column < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if offset is not None:
        value += offset
    return value


@triton.jit
def _dropped(value, low, high, column, threshold, scale):
    """dropout(value): the kept elements times scale, 0 elsewhere."""
    return tl.where(kept(low, high, column, threshold), value * scale, 0.0)


@triton.jit
def _rstd(square, eps):
    """1 / sqrt(square + eps), correctly rounded twice: the approximations of either lean to one side."""
    return tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.sqrt_rn(square + eps))


@triton.jit
def _two_sums(a, b):
    """The sums of the rows of both, through shared memory together."""
    return tl.split(tl.sum(tl.join(a, b), 1))


@triton.jit
def _forward(
    x, residual, weight, bias, h, y, mean, rstd, seed, x_stride, r_stride, M, eps, offset, threshold, scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of whole rows. Without `mean` this is rms_norm, without `seed` there is no dropout."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = _tile(row, column, M, N, BLOCK)
    place = row[:, None] * N + column[None, :]
    at = row[:, None] * _stride(x_stride, N) + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if residual is not None:
        at = row[:, None] * _stride(r_stride, N) + column[None, :]
        other = tl.load(residual + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if seed is not None:
            low, high = row_keys(tl.load(seed), row)
            value = _dropped(value, low[:, None], high[:, None], column[None, :], threshold, scale)
        added = (value + other).to(h.dtype.element_ty)
        tl.store(h + place, added, mask=inside)
        value = added.to(tl.float32)
    if mean is not None:
        mu = tl.sum(value, 1) / N
        value = value - mu[:, None]
        if N < BLOCK:
            value = tl.where((column < N)[None, :], value, 0.0)
        shift = tl.sum(value, 1) / N
        r = _rstd(tl.maximum(tl.sum(value * value, 1) / N - shift * shift, 0.0), eps)
        tl.store(mean + row, mu + shift, mask=row < M)
        value = value * r[:, None] - (shift * r)[:, None]
    else:
        r = _rstd(tl.sum(value * value, 1) / N, eps)
        value = value * r[:, None]
    tl.store(rstd + row, r, mask=row < M)
    if weight is not None:
        value = value * _parameter(weight, column, offset, N)[None, :]
    if bias is not None:
        value = value + _parameter(bias, column, None, N)[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide(
    x, residual, weight, bias, h, y, mean, rstd, seed, x_stride, r_stride, eps, offset, threshold, scale,
    N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row in pieces, twice: the statistics (and h), then y, from x or h as the first round left it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    source = x + row * _stride(x_stride, N)
    average = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    if residual is not None:
        other_source = residual + row * _stride(r_stride, N)
        if seed is not None:
            low, high = row_keys(tl.load(seed), row)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        column = start + lane
        exists = column < N
        value = tl.load(source + column, mask=exists, other=0.0).to(tl.float32)
        if residual is not None:
            other = tl.load(other_source + column, mask=exists, other=0.0).to(tl.float32)
            if seed is not None:
                value = _dropped(value, low, high, column, threshold, scale)
            added = (value + other).to(h.dtype.element_ty)
            tl.store(h + row * N + column, added, mask=exists)
            value = added.to(tl.float32)
        if mean is not None:
            delta = tl.where(exists, value - average, 0.0)
            average += delta * (1.0 / (start // BLOCK + 1))
            squares += delta * (value - average)
        else:
            squares += value * value
    if mean is not None:
        count = ((N - lane + BLOCK - 1) // BLOCK).to(tl.float32)  # of the values each lane has seen
        mu = tl.sum(average * count, 0) / N
        average = average - mu
        shift = tl.sum(average * count, 0) / N
        square = tl.maximum(tl.sum(squares + average * average * count, 0) / N - shift * shift, 0.0)
        mu += shift
        tl.store(mean + row, mu)
    else:
        square = tl.sum(squares, 0) / N
    r = _rstd(square, eps)
    tl.store(rstd + row, r)
    if residual is not None:
        source = h + row * N
        tl.debug_barrier()  # the block's own writes to h are read back
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        column = start + lane
        exists = column < N
        value = tl.load(source + column, mask=exists, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if mean is not None:
            value = value - mu
        value = value * r
        if weight is not None:
            value = value * _parameter(weight, column, offset, N)
        if bias is not None:
            value = value + _parameter(bias, column, None, N)
        tl.store(y + row * N + column, value.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    dy, x, weight, mean, rstd, dh, seed, dx, dr, parts, dy_stride, x_stride, M, offset, threshold, scale,
    BIAS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many tiles of whole rows: dx (and dr, the residual's), and one part of dweight and dbias."""
    column = tl.arange(0, BLOCK)
    if weight is not None:
        w = _parameter(weight, column, offset, N)[None, :]
        sum_w = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS:
        sum_b = tl.zeros([ROWS, BLOCK], tl.float32)
    if seed is not None:
        number = tl.load(seed)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        inside = _tile(row, column, M, N, BLOCK)
        place = row[:, None] * N + column[None, :]
        xhat = tl.load(x + row[:, None] * _stride(x_stride, N) + column[None, :], mask=inside, other=0.0)
        g = tl.load(dy + row[:, None] * _stride(dy_stride, N) + column[None, :], mask=inside, other=0.0)
        r = tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        g = g.to(tl.float32)
        xhat = xhat.to(tl.float32)
        if mean is not None:
            xhat = xhat - tl.load(mean + row, mask=row < M, other=0.0)[:, None]
        xhat = xhat * r
        if BIAS:
            sum_b += g
        if weight is not None:
            sum_w += g * xhat
            g = g * w
        if mean is not None:
            c1, c2 = _two_sums(g, g * xhat)
            d = (g - (c1 / N)[:, None] - xhat * (c2 / N)[:, None]) * r
        else:
            d = (g - xhat * (tl.sum(g * xhat, 1) / N)[:, None]) * r
        if dh is not None:
            d += tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            tl.store(dr + place, d.to(dr.dtype.element_ty), mask=inside)
            low, high = row_keys(number, row)
            d = _dropped(d, low[:, None], high[:, None], column[None, :], threshold, scale)
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    parts += tl.program_id(0) * N + column
    if weight is not None:
        tl.store(parts, tl.sum(sum_w, 0), mask=column < N)
        parts += tl.num_programs(0) * N
    if BIAS:
        tl.store(parts, tl.sum(sum_b, 0), mask=column < N)


@triton.jit
def _backward_wide(
    dy, x, weight, mean, rstd, dh, seed, dx, dr, dy_stride, x_stride, offset, threshold, scale,
    N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row in pieces, twice: its two sums, then dx (and dr) from what is still in the cache."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x_row = x + row * _stride(x_stride, N)
    dy_row = dy + row * _stride(dy_stride, N)
    r = tl.load(rstd + row)
    mu = 0.0
    if mean is not None:
        mu = tl.load(mean + row)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gx = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        column = start + lane
        exists = column < N
        xhat = (tl.load(x_row + column, mask=exists, other=0.0).to(tl.float32) - mu) * r
        g = tl.load(dy_row + column, mask=exists, other=0.0).to(tl.float32)
        if weight is not None:
            g = g * _parameter(weight, column, offset, N)
        sum_g += g
        sum_gx += g * xhat
    c1 = 0.0
    if mean is not None:
        c1 = tl.sum(sum_g, 0) / N
    c2 = tl.sum(sum_gx, 0) / N
    if seed is not None:
        low, high = row_keys(tl.load(seed), row)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        column = start + lane
        exists = column < N
        xhat = (tl.load(x_row + column, mask=exists, other=0.0).to(tl.float32) - mu) * r
        g = tl.load(dy_row + column, mask=exists, other=0.0).to(tl.float32)
        if weight is not None:
            g = g * _parameter(weight, column, offset, N)
        d = (g - c1 - xhat * c2) * r
        if dh is not None:
            d += tl.load(dh + row * N + column, mask=exists, other=0.0).to(tl.float32)
        if seed is not None:
            tl.store(dr + row * N + column, d.to(dr.dtype.element_ty), mask=exists)
            d = _dropped(d, low, high, column, threshold, scale)
        tl.store(dx + row * N + column, d.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def _columns(
    dy, x, mean, rstd, parts, dy_stride, x_stride, M, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The parts of dweight and dbias for some columns, from every so many rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WEIGHT:
        sum_w = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS:
        sum_b = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        inside = (row < M)[:, None] & (column < N)[None, :]
        g = tl.load(dy + row[:, None] * _stride(dy_stride, N) + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            xhat = tl.load(x + row[:, None] * _stride(x_stride, N) + column[None, :], mask=inside, other=0.0)
            xhat = xhat.to(tl.float32)
            if mean is not None:
                xhat = xhat - tl.load(mean + row, mask=row < M, other=0.0)[:, None]
            sum_w += g * xhat * tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        if BIAS:
            sum_b += g
    parts += tl.program_id(1) * N + column
    if WEIGHT:
        tl.store(parts, tl.sum(sum_w, 0), mask=column < N)
        parts += tl.num_programs(1) * N
    if BIAS:
        tl.store(parts, tl.sum(sum_b, 0), mask=column < N)


@triton.jit
def _add_parts(parts, dw, db, P, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dw (in the programs with 1 in y, db) = the sum of P parts, in an order that depends on P alone."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    second = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, P, ROWS):
        part = start + tl.arange(0, ROWS)
        inside = (part < P)[:, None] & (column < N)[None, :]
        total += tl.load(parts + (second * P + part)[:, None] * N + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if second == 0:
        tl.store(dw + column, result.to(dw.dtype.element_ty), mask=column < N)
    else:
        tl.store(db + column, result.to(db.dtype.element_ty), mask=column < N)


# --- on the host -----------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _forward_shape(m: int, n: int, itemsize: int, sms: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps.

    Each thread loads 64 bytes at once, so that the registers of a multiprocessor hold some 50 KiB on their way, twice
    what H200's bandwidth times its latency asks for, in several programs that take turns between memory and sums.
    """
    block = next_power_of_2(n)
    return _shape(m, block, 8192 // itemsize, 64 // itemsize, sms)


def _shape(m: int, block: int, elements: int, per_thread: int, sms: int) -> tuple[int, int, int]:
    """Tiles of this many elements, fewer while some multiprocessors would have less than four; at least one row."""
    height = max(elements // block, 1)
    while height > 1 and cdiv(m, height) < 4 * sms:
        height //= 2
    warps = height * block // (32 * per_thread)
    return height, block, max(warps, min(4, height * block // 256), 1)


@functools.lru_cache(4096)
def _backward_shape(m: int, n: int, streams: int, itemsize: int, at: Target) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile, warps, programs and stages.

    16 elements of each stream a thread: with two float32 sums more no register spills. Programs stay for the whole
    call, as many as fit at once, and each has rows on their way through shared memory while it works on others.
    """
    height, block, warps = _shape(m, next_power_of_2(n), 2048, 16, at.sms)
    together = max(16 // warps, 1)  # programs of a multiprocessor, by registers
    room = streams * height * block * itemsize * together
    stages = 3 if 2 * room <= at.shared else 2
    tiles = max(cdiv(m, height), 1)
    return height, block, warps, cdiv(tiles, cdiv(tiles, at.sms * together)), stages


@functools.lru_cache(4096)
def _parts_shape(parts: int, n: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of _add_parts, and warps: narrow, so that short rows too keep the GPU busy."""
    tall, across = min(next_power_of_2(parts), 256), 16 if n < 4096 else 64
    return tall, across, max(min(tall * across // 512, 8), 1)


def _lines(tensor: Tensor) -> tuple[Tensor, int | None]:
    """The tensor as rows and the distance between them, None where they follow each other."""
    if tensor.is_contiguous():  # no view is made of the usual case
        return tensor, None
    flat = rows(tensor)
    return flat, flat.stride(0)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float | None,
    center: bool,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, h (empty without a residual), mean (only if center) and rstd."""
    shape = x.shape
    n = shape[-1]
    m = x.numel() // n if n else 0
    y, rstd = empty(shape, x), empty((m,), x, F32)
    mean = empty((m,), x, F32) if center else None
    x, x_stride = _lines(x)
    h, out, r_stride = nothing(x), None, None
    if residual is not None:
        residual, r_stride = _lines(residual)
        h = out = empty(shape, x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (x, residual, weight, bias, out, y, mean, rstd, seed, x_stride, r_stride)
    numbers = (eps, offset, threshold(dropout), 1.0 / (1.0 - dropout))
    if n > REGISTERS:
        piece = WIDE_BYTES // x.itemsize
        launch(
            _forward_wide, (m,), *tensors, *numbers, N=n, BLOCK=piece, STAGES=WIDE_STAGES, num_warps=WIDE_WARPS
        )  # fmt: skip
    else:
        height, block, warps = _forward_shape(m, n, x.itemsize, target(x).sms)
        launch(_forward, (cdiv(m, height),), *tensors, m, *numbers, N=n, ROWS=height, BLOCK=block, num_warps=warps)
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    needs_bias: bool,
    offset: float | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (empty without dropout: dx is both), dweight, dbias (empty where not asked for)."""
    n, m = x.shape[-1], rstd.numel()
    at = target(x)
    dx = empty(x.shape, x)
    dr = nothing(x) if seed is None else empty(x.shape, x)
    dtype = F32 if weight is None else weight.dtype
    dw = nothing(x, dtype) if weight is None else empty((n,), x, dtype)
    db = empty((n,), x, dtype) if needs_bias else nothing(x, dtype)
    sums = (weight is not None) + needs_bias
    x, x_stride = _lines(x)
    dy, dy_stride = _lines(dy)
    weight = None if weight is None else weight.contiguous()
    dh = None if dh is None else dh.contiguous()
    tensors = (dy, x, weight, mean, rstd, dh, seed, dx, None if seed is None else dr)
    numbers = (offset, threshold(dropout), 1.0 / (1.0 - dropout))
    if n > REGISTERS:
        launch(
            _backward_wide, (m,), *tensors, dy_stride, x_stride, *numbers,
            N=n, BLOCK=WIDE_BYTES // x.itemsize, STAGES=WIDE_STAGES, num_warps=WIDE_WARPS,
        )  # fmt: skip
        across = cdiv(n, COLUMNS)
        count = max(min(cdiv(m, COLUMN_ROWS), 4 * at.sms // across), 1)
        parts = empty((sums, count, n), x, F32)
        launch(
            _columns, (across if sums else 0, count), dy, x, mean, rstd, parts, dy_stride, x_stride, m,
            WEIGHT=weight is not None, BIAS=needs_bias, N=n, ROWS=COLUMN_ROWS, BLOCK=COLUMNS, STAGES=3,
            num_warps=COLUMN_WARPS,
        )  # fmt: skip
    else:
        height, block, warps, count, stages = _backward_shape(m, n, 2 if dh is None else 3, x.itemsize, at)
        parts = empty((sums, count, n), x, F32)
        launch(
            _backward, (count,), *tensors, parts, dy_stride, x_stride, m, *numbers,
            BIAS=needs_bias, N=n, ROWS=height, BLOCK=block, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    tall, across, warps = _parts_shape(count, n)
    first, second = (dw, db) if weight is not None else (db, dw)
    launch(
        _add_parts, (cdiv(n, across), sums), parts, first, second, count,
        N=n, ROWS=tall, BLOCK=across, num_warps=warps,
    )  # fmt: skip
    return dx, dr, dw, db
