"""cross_entropy in Triton: loss, and with it the gradient, from logits that are read from memory once.

1. _total: the sum of the rows' class weights, which a mean divides by; it stays on the GPU.
2. Rows up to NARROW classes: _narrow holds ROWS rows in registers, reads each logit once and writes its gradient once.
   Longer rows: _wide runs over a row twice, first for largest logit and sum of exponentials, then, backwards, for the
   gradient.
3. _total again adds up the rows' losses, in a fixed order.
Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.

Bytes: logits read, gradients written, labels 8 a row. _wide reads a row again, but from the SM's own L1 or from L2:
16 warps take a row of up to 128 KB and two such rows run on an SM, 200 KB at V=50304 in bfloat16 against 228 to 248 KB
of L1 on sm_90; 132 SMs hold 26 MB then, half of the L2. Walking backwards meets what was read last first, so that a row
too long for the L1 still finds its last 200 KB there. Rows from 128 KB on take 32 warps and an SM alone.
Layout: a thread holds K = 16 bytes of neighbouring logits per load, two loads ahead of the two it works on, so that
64 KB are on their way to an SM. Its running maximum is per thread and per K logits: (K + 1) / K exponentials a logit
instead of two, and no barrier until the row's end. At 4.8 TB/s an H200 moves 1.2e12 bfloat16 logits a second
in and out; 132 SMs make 3.7e12 exponentials, the two passes need 2.1 a logit: near enough that a third would cost.
Fewer rows than SMs: each row is split over programs, whose partial sums _combine joins; the gradient is then a third
kernel, and reads from L2 what fits there.

Rows that do not begin on 16 bytes (V = 50257) keep wide accesses: up to K - 1 logits at either end are a tile of their
own, between them lies an aligned body.

Not built, by arithmetic: a whole row of 50304 in registers needs 1024 threads with 64 logits each, leaves one program
on an SM, and with it nobody who loads while it computes. One maximum per element doubles the exponentials.
Tried and lost, on ahead-of-time figures for sm_90 alone (no GPU figure stands behind any of this): tl.exp, which keeps
denormals (960 instructions in _wide, 768 with exp2); a branch on the output's alignment inside the kernel (100
registers, 56 as a constant); _narrow with 4 warps on a row (3320 instructions for 16 rows of 65, 1120 for 4 rows a
warp).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, target
from fastlm.kernels._log_sum_exp import (
    LOG2_E,
    cap_slope,
    capped,
    exp,
    finite_or_zero,
    labelled,
    row_gradient,
    row_loss,
)
from fastlm.kernels._scale import scale as scale

NARROW = 2048
"""Classes up to which rows are held in registers, 16 logits a thread. A warp has rows of up to 512 to itself: what is
computed per row every thread of the program computes."""
TOTAL_BLOCK = 8192
MAX_SPLITS = 128


class Options(NamedTuple):
    """What the loss is, as the public function takes it; weight_sum is needed under label smoothing alone."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    weight_sum: Tensor | float


def options(
    weight: Tensor | None, classes: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None
) -> Options:
    known = weight is None or not label_smoothing
    total = float(classes) if known or weight is None else weight.sum(dtype=torch.float32)
    cap = None if softcap is None else float(softcap)  # an int would be another kernel
    return Options(weight, ignore_index, label_smoothing, z_loss, cap, total)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _total(
    values, weight, divisor, result, count, stride, classes, ignore_index, LABELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a block of values, or of the class weights of a block of labels."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if LABELS:
        label = tl.load(values + at * stride, mask=inside, other=0)
        _, _, value = labelled(label, weight, classes, ignore_index, HAS_WEIGHT)
        value = tl.where(inside, value, 0.0)
    else:
        value = tl.load(values + at, mask=inside, other=0.0)
    sum = tl.sum(value, 0)
    if DIVIDE:
        sum = sum / tl.load(divisor)
    tl.store(result + tl.program_id(0), sum)


@triton.jit
def scalar(value, POINTER: tl.constexpr):
    if POINTER:
        result = tl.load(value)
    else:
        result = value
    return result


@triton.jit
def gradient_scale(dy, dy_stride, row, total, HAS_DY: tl.constexpr, MEAN: tl.constexpr):
    """What a row's gradient is multiplied by."""
    scale = 1.0
    if HAS_DY:
        scale = tl.load(dy + row * dy_stride).to(tl.float32)
    if MEAN:
        scale = scale / tl.load(total)
    return scale


@triton.jit
def _narrow(
    x, out, target, weight, weight_sum, dy, total, loss, stats, M, V, x_stride, out_stride, target_stride, dy_stride,
    stats_stride, ignore_index, smoothing, z_loss, softcap, SUM: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SUM_IS_POINTER: tl.constexpr, HAS_DY: tl.constexpr, MEAN: tl.constexpr,
    SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: their loss and stats (SUM) and gradient (GRADIENT); without SUM the stats are read."""
    row_index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row_index < M
    row_index = tl.where(inside, row_index, 0)
    label = tl.load(target + row_index * target_stride)
    kept, label, row = labelled(label, weight, V, ignore_index, HAS_WEIGHT)
    kept = kept & inside
    column = tl.arange(0, BLOCK)
    mask = kept[:, None] & (column < V)[None, :]
    z = tl.load(x + row_index[:, None] * x_stride + column[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    if CAP:
        z = tl.where(mask, capped(z, softcap, CAP), float("-inf"))
    own = column[None, :] == label.to(tl.int32)[:, None]
    share = smoothing / V
    whole = 0.0
    if SMOOTH:
        whole = scalar(weight_sum, SUM_IS_POINTER)
    if SUM:
        own_z = tl.sum(tl.where(own, z, 0.0), 1)
        others = tl.where(own, float("-inf"), z)
        top_rest = tl.max(others, 1)
        rest = tl.sum(exp(others - finite_or_zero(top_rest)[:, None]), 1)
        pivot = finite_or_zero(own_z)
        pulled = rest * 0.0
        if SMOOTH:
            each = z - pivot[:, None]
            if HAS_WEIGHT:
                each = each * tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
            pulled = tl.sum(tl.where(mask, each, 0.0), 1)
        row_value, top, log_sum, rest_share = row_loss(
            top_rest, rest, own_z, pivot, pulled, whole, kept, row, smoothing, share, z_loss, SMOOTH, Z_LOSS
        )
        tl.store(loss + row_index, row_value, mask=inside)
        tl.store(stats + row_index, top, mask=inside)
        tl.store(stats + stats_stride + row_index, log_sum, mask=inside)
        tl.store(stats + stats_stride * 2 + row_index, rest_share, mask=inside)
    else:
        top = tl.load(stats + row_index)
        log_sum = tl.load(stats + stats_stride + row_index)
        rest_share = tl.load(stats + stats_stride * 2 + row_index)
    if GRADIENT:
        scale = gradient_scale(dy, dy_stride, row_index, total, HAS_DY, MEAN)
        push, extra, pull, spread = row_gradient(
            top, log_sum, whole, row, scale, smoothing, share, z_loss, SMOOTH, Z_LOSS
        )
        p = tl.exp2((z - top[:, None]) * LOG2_E - (log_sum * LOG2_E)[:, None])
        d = tl.where(own, p * extra[:, None] - (pull * rest_share)[:, None], p * push[:, None])
        if SMOOTH:
            if HAS_WEIGHT:
                w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
                d -= w * (tl.zeros([ROWS], tl.float32) + spread)[:, None]
            else:
                d -= (tl.zeros([ROWS], tl.float32) + spread)[:, None]
        if CAP:
            d *= cap_slope(z, softcap)
        d = tl.where(kept[:, None], d, 0.0)
        to = out + row_index[:, None] * out_stride + column[None, :]
        tl.store(to, d, mask=inside[:, None] & (column < V)[None, :])


@triton.jit
def _add(m, s, z, K: tl.constexpr):
    """The running maximum and sum of exponentials of each K logits of z taken into those of their lane."""
    lanes = tl.reshape(z, [z.shape[0] // K, K])
    top = tl.maximum(m, tl.max(lanes, 1))
    shift = finite_or_zero(top)
    return top, s * exp(m - shift) + tl.sum(exp(lanes - shift[:, None]), 1)


@triton.jit
def _pulled(z, pivot, weight, column, mask, HAS_WEIGHT: tl.constexpr):
    """The share of these classes in sum_c w[c] * (z[c] - pivot)."""
    each = z - pivot
    if HAS_WEIGHT:
        each = each * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, each, 0.0)


@triton.jit
def _slope(
    z, own, weight, column, mask, top, log_sum, push, extra, pull_rest, spread, softcap, HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of a row's logits; OWN says that the label may be among them."""
    p = tl.exp2((z - top) * LOG2_E - log_sum * LOG2_E)
    d = p * push
    if OWN:
        d = tl.where(own, p * extra - pull_rest, d)
    if SMOOTH:
        if HAS_WEIGHT:
            d -= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) * spread
        else:
            d -= spread
    if CAP:
        d *= cap_slope(z, softcap)
    return d


@triton.jit
def _wide(
    x, out, target, weight, weight_sum, dy, total, loss, stats, partials, M, V, x_stride, out_stride, target_stride,
    dy_stride, stats_stride, ignore_index, smoothing, z_loss, softcap, splits, span, SUM: tl.constexpr,
    GRADIENT: tl.constexpr, FINISH: tl.constexpr, EDGES: tl.constexpr, SAME: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SUM_IS_POINTER: tl.constexpr, HAS_DY: tl.constexpr, MEAN: tl.constexpr, SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr, CAP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A span of a row: its sums (SUM), to partials or as loss and stats (FINISH), and its gradient (GRADIENT).

    Columns are counted from the first that lies on 16 bytes; EDGES: there may be up to K - 1 before it and after the
    last whole K. SAME: out's rows begin on 16 bytes where x's do.
    """
    row_index = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    label = tl.load(target + row_index * target_stride)
    kept, label, row = labelled(label, weight, V, ignore_index, HAS_WEIGHT)
    label = label.to(tl.int32)
    x_row = x + row_index * x_stride
    head = 0
    full = V
    x_body = x_row
    edge = tl.arange(0, 2 * K)
    if EDGES:
        address = x_row.to(tl.int64)
        item: tl.constexpr = 16 // K
        head = (((16 - address % 16) % 16) // item).to(tl.int32)
        full = (V - head) // K * K
        x_body = tl.multiple_of(x_row + head, 16)
    edge_column = tl.where(edge < K, edge, edge - K + (head + full))
    # Limits, not a scalar truth value in the mask: the interpreter makes integers of those.
    edge_mask = (edge < tl.where(split == 0, head, 0)) | ((edge >= K) & (edge_column < tl.where(split == 0, V, 0)))
    begin = split * span
    end = tl.minimum(begin + span, full)
    column = tl.arange(0, BLOCK)
    own_at = label - head
    share = smoothing / V
    whole = 0.0
    if SMOOTH:
        whole = scalar(weight_sum, SUM_IS_POINTER)

    if SUM:
        own_z = capped(tl.load(x_row + label).to(tl.float32), softcap, CAP)
        pivot = finite_or_zero(own_z)
        m = tl.full([BLOCK // K], float("-inf"), tl.float32)
        s = tl.zeros([BLOCK // K], tl.float32)
        pulls = tl.zeros([BLOCK], tl.float32)
        stop = tl.where(kept, end, begin)  # an ignored row is not read
        ahead = tl.load(x_body + begin + column, mask=begin + column < stop, other=float("-inf"))
        for start in range(begin, stop, BLOCK):
            raw = ahead
            after = start + BLOCK + column
            ahead = tl.load(x_body + after, mask=after < stop, other=float("-inf"))
            z = raw.to(tl.float32)
            if CAP:
                z = tl.where(start + column < stop, capped(z, softcap, CAP), float("-inf"))
            if SMOOTH:
                pulls += _pulled(z, pivot, weight, start + head + column, start + column < stop, HAS_WEIGHT)
            if (own_at >= start) & (own_at < start + BLOCK):
                z = tl.where(start + column == own_at, float("-inf"), z)
            m, s = _add(m, s, z, K)
        top_rest = tl.max(m, 0)
        rest = tl.sum(s * exp(m - finite_or_zero(top_rest)), 0)
        pulled = tl.sum(pulls, 0)
        if EDGES:
            mask = edge_mask & (edge_column < tl.where(kept, V, 0))
            z = tl.load(x_row + edge_column, mask=mask, other=float("-inf")).to(tl.float32)
            z = tl.where(mask, capped(z, softcap, CAP), float("-inf"))
            if SMOOTH:
                pulled += tl.sum(_pulled(z, pivot, weight, edge_column, mask, HAS_WEIGHT), 0)
            z = tl.where(edge_column == label, float("-inf"), z)
            top = tl.maximum(top_rest, tl.max(z, 0))
            shift = finite_or_zero(top)
            rest = rest * exp(top_rest - shift) + tl.sum(exp(z - shift), 0)
            top_rest = top
        if FINISH:
            row_value, top, log_sum, rest_share = row_loss(
                top_rest, rest, own_z, pivot, pulled, whole, kept, row, smoothing, share, z_loss, SMOOTH, Z_LOSS
            )
            tl.store(loss + row_index, row_value)
            tl.store(stats + row_index, top)
            tl.store(stats + stats_stride + row_index, log_sum)
            tl.store(stats + stats_stride * 2 + row_index, rest_share)
        else:
            partial = partials + (row_index * splits + split) * 3
            tl.store(partial, top_rest)
            tl.store(partial + 1, rest)
            tl.store(partial + 2, pulled)
    else:
        top = tl.load(stats + row_index)
        log_sum = tl.load(stats + stats_stride + row_index)
        rest_share = tl.load(stats + stats_stride * 2 + row_index)

    if GRADIENT:
        scale = gradient_scale(dy, dy_stride, row_index, total, HAS_DY, MEAN)
        push, extra, pull, spread = row_gradient(
            top, log_sum, whole, row, scale, smoothing, share, z_loss, SMOOTH, Z_LOSS
        )
        pull_rest = pull * rest_share
        out_row = out + row_index * out_stride
        out_body = out_row + head
        if SAME:
            out_body = tl.multiple_of(out_body, 16)
        tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
        for back in range(0, tiles):
            start = begin + (tiles - 1 - back) * BLOCK
            inside = start + column < end
            d = tl.zeros([BLOCK], tl.float32)
            if kept:
                value = tl.load(x_body + start + column, mask=inside, other=0.0).to(tl.float32)
                tile = capped(value, softcap, CAP)
                if (own_at >= start) & (own_at < start + BLOCK):
                    d = _slope(
                        tile, start + column == own_at, weight, start + head + column, inside, top, log_sum, push,
                        extra, pull_rest, spread, softcap, HAS_WEIGHT, SMOOTH, CAP, True,
                    )  # fmt: skip
                else:
                    d = _slope(
                        tile, inside, weight, start + head + column, inside, top, log_sum, push, extra, pull_rest,
                        spread, softcap, HAS_WEIGHT, SMOOTH, CAP, False,
                    )  # fmt: skip
            tl.store(out_body + start + column, d, mask=inside)
        if EDGES:
            mask = edge_mask & (edge_column < tl.where(kept, V, 0))
            z = tl.load(x_row + edge_column, mask=mask, other=0.0).to(tl.float32)
            d = _slope(
                capped(z, softcap, CAP), edge_column == label, weight, edge_column, edge_mask, top, log_sum, push,
                extra, pull_rest, spread, softcap, HAS_WEIGHT, SMOOTH, CAP, True,
            )  # fmt: skip
            tl.store(out_row + edge_column, tl.where(kept, d, 0.0), mask=edge_mask)


@triton.jit
def _combine(
    x, target, weight, weight_sum, partials, loss, stats, V, x_stride, target_stride, stats_stride, ignore_index,
    smoothing, z_loss, softcap, splits, HAS_WEIGHT: tl.constexpr, SUM_IS_POINTER: tl.constexpr,
    SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's loss and stats from the sums of its spans."""
    row_index = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row_index * target_stride)
    kept, label, row = labelled(label, weight, V, ignore_index, HAS_WEIGHT)
    own_z = capped(tl.load(x + row_index * x_stride + label).to(tl.float32), softcap, CAP)
    split = tl.arange(0, BLOCK)
    partial = partials + (row_index * splits + split) * 3
    m = tl.load(partial, mask=split < splits, other=float("-inf"))
    s = tl.load(partial + 1, mask=split < splits, other=0.0)
    pulled = tl.sum(tl.load(partial + 2, mask=split < splits, other=0.0), 0)
    top_rest = tl.max(m, 0)
    rest = tl.sum(s * exp(m - finite_or_zero(top_rest)), 0)
    whole = 0.0
    if SMOOTH:
        whole = scalar(weight_sum, SUM_IS_POINTER)
    row_value, top, log_sum, rest_share = row_loss(
        top_rest, rest, own_z, finite_or_zero(own_z), pulled, whole, kept, row, smoothing, smoothing / V, z_loss,
        SMOOTH, Z_LOSS,
    )  # fmt: skip
    tl.store(loss + row_index, row_value)
    tl.store(stats + row_index, top)
    tl.store(stats + stats_stride + row_index, log_sum)
    tl.store(stats + stats_stride * 2 + row_index, rest_share)


# --- launches --------------------------------------------------------------------------------------------------------


def _sum(
    values: Tensor, divisor: Tensor | None, weight: Tensor | None = None, labels: tuple[int, int] | None = None
) -> Tensor:
    """() float32: the sum of values (count,), or of the class weights of labels, given as (V, ignore_index)."""
    result = values
    classes, ignore_index = labels or (0, 0)
    while True:
        blocks = max(1, cdiv(values.numel(), TOTAL_BLOCK))
        last = blocks == 1
        result = empty((blocks,), values, torch.float32)
        block = TOTAL_BLOCK if not last else max(16, next_power_of_2(values.numel()))
        launch(
            _total, (blocks,), values, weight, divisor if last else None, result, values.numel(), values.stride(0),
            classes, ignore_index, LABELS=labels is not None, HAS_WEIGHT=labels is not None and weight is not None,
            DIVIDE=last and divisor is not None, BLOCK=block, num_warps=4 if block < 4096 else 16,
        )  # fmt: skip
        if last:
            return result.reshape(())
        values, labels = result, None


def row_weights(labels: Tensor, option: Options, classes: int, reduction: str) -> Tensor | None:
    """() float32, what a mean divides by: the sum of w[t] over the rows that count. None for the other reductions."""
    if reduction != "mean":
        return None
    return _sum(labels, None, option.weight, (classes, option.ignore_index))


def reduced(loss: Tensor, total: Tensor | None, reduction: str) -> Tensor:
    return loss if reduction == "none" else _sum(loss, total)


def as_rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _run(
    x: Tensor,
    labels: Tensor,
    option: Options,
    dy: Tensor | None,
    total: Tensor | None,
    loss: Tensor | None,
    stats: Tensor,
    out: Tensor | None,
) -> None:
    """Loss and stats of the rows unless loss is None, then their gradient unless out is None."""
    (M, V), (weight, ignore_index, smoothing, z_loss, softcap, weight_sum) = x.shape, option
    if M == 0:
        return
    where = (0 if out is None else out.stride(0), labels.stride(0), dy.stride(0) if dy is not None and dy.dim() else 0)
    numbers = (ignore_index, smoothing, z_loss, 1.0 if softcap is None else softcap)
    flags = {
        "HAS_WEIGHT": weight is not None, "SUM_IS_POINTER": isinstance(weight_sum, Tensor), "SMOOTH": smoothing != 0.0,
        "Z_LOSS": z_loss != 0.0, "CAP": softcap is not None,
    }  # fmt: skip
    upstream = {"HAS_DY": dy is not None, "MEAN": total is not None}
    tensors = (x, out, labels, weight, weight_sum, dy, total, loss, stats)
    if V <= NARROW:
        block = max(16, next_power_of_2(V))
        warps = max(1, block // 512)
        rows = 512 * warps // block
        launch(
            _narrow, (cdiv(M, rows),), *tensors, M, V, x.stride(0), *where, stats.stride(0), *numbers,
            SUM=loss is not None, GRADIENT=out is not None, **flags, **upstream, ROWS=rows, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
        return

    size, sms = x.itemsize, target(x).sms
    K = 16 // size
    warps = 4 if V * size <= 32 << 10 else 8 if V * size <= 64 << 10 else 16 if V * size < 128 << 10 else 32
    block = warps * 32 * K * 2
    edges = V % 16 != 0 or x.stride(0) % 16 != 0 or x.storage_offset() * size % 16 != 0
    apart = 0 if out is None else (x.data_ptr() - out.data_ptr()) % 16 + (x.stride(0) - out.stride(0)) * size % 16

    def wide(splits: int, partials: Tensor | None, add: bool, make: bool) -> None:
        span = cdiv(cdiv(V, splits), block) * block
        launch(
            _wide, (M * splits,), *tensors, partials, M, V, x.stride(0), *where, stats.stride(0), *numbers, splits,
            span, SUM=add, GRADIENT=make, FINISH=partials is None, EDGES=edges, SAME=edges and apart == 0,
            **flags, **upstream, K=K, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip

    # With fewer rows than SMs the rows are split, into spans of at least a block.
    splits = 1 if sms <= M else max(1, min(2 * sms // M, cdiv(V, block), MAX_SPLITS))
    if loss is None:
        wide(cdiv(V, 4 * block), None, False, True)
    elif splits == 1:
        wide(1, None, True, out is not None)
    else:
        partials = empty((M, splits, 3), x, torch.float32)
        wide(splits, partials, True, False)
        launch(
            _combine, (M,), x, labels, weight, weight_sum, partials, loss, stats, V, x.stride(0), labels.stride(0),
            stats.stride(0), *numbers, splits, **flags, BLOCK=max(16, next_power_of_2(splits)), num_warps=1,
        )  # fmt: skip
        if out is not None:
            wide(splits, None, False, True)


def forward_rows(
    logits: Tensor, labels: Tensor, option: Options, total: Tensor | None, loss: Tensor, stats: Tensor,
    dlogits: Tensor | None,
) -> None:  # fmt: skip
    """Fills loss (M,), stats (3, M) and, for an upstream gradient of 1, dlogits, which may be the logits' memory."""
    _run(logits, labels, option, None, total, loss, stats, dlogits)


def backward_rows(
    dy: Tensor, logits: Tensor, labels: Tensor, option: Options, total: Tensor | None, stats: Tensor, dlogits: Tensor
) -> None:
    """Fills dlogits, which may be the logits' own memory; dy is () or (M,) of any stride."""
    _run(logits, labels, option, dy, total, None, stats, dlogits)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_grad: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = logits.shape
    x, option = as_rows(logits), options(weight, v, ignore_index, label_smoothing, z_loss, softcap)
    total = row_weights(target, option, v, reduction)
    loss, stats = empty((m,), logits, torch.float32), empty((3, m), logits, torch.float32)
    dlogits = None if not needs_grad else empty((m, v), logits) if out is None else x
    forward_rows(x, target, option, total, loss, stats, dlogits)
    if out is not None and x is not out:  # as_rows() made a copy
        out.copy_(x)
    made = empty((0,), logits) if dlogits is None or out is not None else dlogits
    return reduced(loss, total, reduction), stats, made


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    v = logits.shape[1]
    x, option = as_rows(logits), options(weight, v, ignore_index, label_smoothing, z_loss, softcap)
    dlogits = empty(logits.shape, logits) if out is None else x
    backward_rows(dy, x, target, option, row_weights(target, option, v, reduction), stats, dlogits)
    if out is None:
        return dlogits
    if x is not out:
        out.copy_(x)
    return empty((0,), logits)
