"""The fused form of linear_cross_entropy: logits live in registers, a tile at a time, and are made three times.

1. _forward: a program takes BM rows and a span of the vocabulary, makes the logits tile by tile and keeps largest logit
   and sum of exponentials a row; _join joins the spans into loss and stats.
2. _factors: what a row's gradient needs, five numbers a row, once.
3. _dhidden: a program makes the logits of its rows again, turns a tile into its gradient and adds gradient @ weight to
   float32 sums that no other program touches. _dweight does the same for BN classes over all rows, and once more where
   a bias wants its gradient.
Cut cross-entropy: Wijmans et al. 2024, arXiv:2411.09009. There, sums are shared under locks; here every program has its
own, so that a result is the same bit for bit, for one product more (five instead of four), and gradients are dropped
only on request: with `filter`, tiles of 128 x 128 (float32: 64 x 64) where every |softmax - onehot| is below it.

Memory beside the results: 12 bytes a row and span, 20 a row, and float32 sums of dhidden, (M, C) a vocabulary split of
_dhidden, of which there are as many as fill the GPU. Never M x V.
Traffic: the sums of _dhidden are read and written once a tile of classes, those of _dweight once a tile of rows,
BM * C * 8 bytes beside 4 * BM * BN * C operations: 64 operations a byte with tiles of 128, so that the L2 (5.5 TB/s),
not the tensor cores, bounds the backward at some 350 TFLOP/s. Filtered tiles pay neither.
Tried and lost, on ahead-of-time figures for sm_90 alone: 128 columns of a sum at a time, or 16 warps, spill (30 to 100
registers a thread), 64 do not; so do tiles transposed for _dweight, whose threads need the factors of 32 rows (114),
and 64-bit offsets within a tile. Sums of dhidden in registers do not fit: 64 x 768 in float32 are 192 a thread of 8
warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, target
from fastlm.kernels._log_sum_exp import (
    cap_slope,
    capped,
    exp,
    finite_or_zero,
    labelled,
    row_gradient,
    row_loss,
)
from fastlm.kernels.cross_entropy import Options, gradient_scale, scalar

TILE = {2: 128, 4: 64}
"""Rows and classes of a tile, and of the gradient filter's decision, by the bytes of hidden's dtype (as
FILTER_TILE in the reference). In float32 the three products of a tile of 128 do not fit the registers."""


@triton.jit
def _local(first, count, BLOCK: tl.constexpr):
    """Indices of a block's rows counted from its first; those past the last row stand for the last."""
    return tl.minimum(tl.arange(0, BLOCK), count - 1 - first)


@triton.jit
def _product(
    a, b, bias, a_first, b_first, a_rows, b_rows, a_stride, b_stride, C, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a[a_first ...] @ b[b_first ...].T + bias over C columns, in float32. Within a tile 32 bits hold an offset."""
    k = tl.arange(0, BK)
    a_at = a + tl.cast(a_first, tl.int64) * a_stride + (_local(a_first, a_rows, BA)[:, None] * a_stride + k[None, :])
    b_at = b + tl.cast(b_first, tl.int64) * b_stride + (_local(b_first, b_rows, BB)[:, None] * b_stride + k[None, :])
    sum = tl.zeros([BA, BB], tl.float32)
    if HAS_BIAS:  # first, where it takes the registers of the sum
        sum += tl.load(bias + b_first + _local(b_first, b_rows, BB)).to(tl.float32)[None, :]
    for start in range(0, C, BK):
        if EVEN:
            left, right = tl.load(a_at + start), tl.load(b_at + start)
        else:
            left = tl.load(a_at + start, mask=(start + k)[None, :] < C, other=0.0)
            right = tl.load(b_at + start, mask=(start + k)[None, :] < C, other=0.0)
        sum = tl.dot(left, tl.trans(right), sum, input_precision=PRECISION)
    return sum


@triton.jit
def _forward(
    hidden, weight, bias, target, class_weight, partials, own, M, V, C, h_stride, w_stride, target_stride, ignore_index,
    softcap, row_blocks, splits, span, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a span, and with it the weight's tiles in L2.
    first = tl.program_id(0) % row_blocks * BM
    split = tl.program_id(0) // row_blocks
    row = first + tl.arange(0, BM)
    inside = row < M
    row = tl.where(inside, row, 0)
    label = tl.load(target + row.to(tl.int64) * target_stride)
    _, label, _ = labelled(label, class_weight, V, ignore_index, False)
    label = label.to(tl.int32)
    m = tl.full([BM], float("-inf"), tl.float32)
    s = tl.zeros([BM], tl.float32)
    z_own = tl.zeros([BM], tl.float32)
    pulled = tl.zeros([BM], tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, V)
    for start in range(begin, end, BN):
        column = start + tl.arange(0, BN)
        real = column < V
        column = tl.where(real, column, 0)
        z = _product(
            hidden, weight, bias, first, start, M, V, h_stride, w_stride, C, HAS_BIAS, PRECISION, EVEN, BM, BN, BK
        )  # fmt: skip
        z = capped(z, softcap, CAP)
        if SMOOTH:
            each = z
            if HAS_WEIGHT:
                each = each * tl.load(class_weight + column).to(tl.float32)[None, :]
            pulled += tl.sum(tl.where(real[None, :], each, 0.0), 1)
        mine = (column[None, :] == label[:, None]) & real[None, :]
        z_own += tl.sum(tl.where(mine, z, 0.0), 1)
        z = tl.where(real[None, :] & (column[None, :] != label[:, None]), z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        shift = finite_or_zero(top)
        s = s * exp(m - shift) + tl.sum(exp(z - shift[:, None]), 1)
        m = top
    partial = partials + (row.to(tl.int64) * splits + split) * 3
    tl.store(partial, m, mask=inside)
    tl.store(partial + 1, s, mask=inside)
    tl.store(partial + 2, pulled, mask=inside)
    tl.store(own + row, z_own, mask=inside & (label >= begin) & (label < end))


@triton.jit
def _join(
    target, class_weight, weight_sum, partials, own, loss, stats, M, V, target_stride, stats_stride, ignore_index,
    smoothing, z_loss, splits, HAS_WEIGHT: tl.constexpr, SUM_IS_POINTER: tl.constexpr, SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and stats of rows from the sums of their spans."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    row = tl.where(inside, row, 0)
    kept, _, factor = labelled(tl.load(target + row * target_stride), class_weight, V, ignore_index, HAS_WEIGHT)
    split = tl.arange(0, BLOCK)
    mask = (split < splits)[None, :] & inside[:, None]
    partial = partials + (row[:, None] * splits + split[None, :]) * 3
    m = tl.load(partial, mask=mask, other=float("-inf"))
    s = tl.load(partial + 1, mask=mask, other=0.0)
    pulled = tl.sum(tl.load(partial + 2, mask=mask, other=0.0), 1)
    z_own = tl.load(own + row)
    top_rest = tl.max(m, 1)
    rest = tl.sum(s * exp(m - finite_or_zero(top_rest)[:, None]), 1)
    whole = 0.0
    if SMOOTH:
        whole = scalar(weight_sum, SUM_IS_POINTER)
    value, top, log_sum, rest_share = row_loss(
        top_rest, rest, z_own, 0.0, pulled, whole, kept, factor, smoothing, smoothing / V, z_loss, SMOOTH, Z_LOSS
    )
    tl.store(loss + row, value, mask=inside)
    tl.store(stats + row, top, mask=inside)
    tl.store(stats + stats_stride + row, log_sum, mask=inside)
    tl.store(stats + stats_stride * 2 + row, rest_share, mask=inside)


@triton.jit
def _factors(
    target, class_weight, weight_sum, dy, total, stats, factors, labels, M, V, target_stride, dy_stride, stats_stride,
    ignore_index, smoothing, z_loss, HAS_WEIGHT: tl.constexpr, SUM_IS_POINTER: tl.constexpr, MEAN: tl.constexpr,
    SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row's gradient needs: factors (4, M), log-sum-exp, push, the label's own gradient and spread, and labels
    (M,). A row that does not count has label -1 and log-sum-exp infinity: all its p are 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < M
    row = tl.where(inside, row, 0)
    kept, label, factor = labelled(tl.load(target + row * target_stride), class_weight, V, ignore_index, HAS_WEIGHT)
    top = tl.load(stats + row)
    log_sum = tl.load(stats + stats_stride + row)
    rest_share = tl.load(stats + stats_stride * 2 + row)
    whole = 0.0
    if SMOOTH:
        whole = scalar(weight_sum, SUM_IS_POINTER)
    push, extra, pull, spread = row_gradient(
        top, log_sum, whole, factor, gradient_scale(dy, dy_stride, row, total, True, MEAN), smoothing, smoothing / V,
        z_loss, SMOOTH, Z_LOSS,
    )  # fmt: skip
    own = (1.0 - rest_share) * extra - pull * rest_share
    tl.store(factors + row, tl.where(kept, top + log_sum, float("inf")), mask=inside)
    tl.store(factors + M + row, tl.where(kept, push, 0.0), mask=inside)
    tl.store(factors + M * 2 + row, tl.where(kept, own, 0.0), mask=inside)
    tl.store(factors + M * 3 + row, tl.where(kept, spread, 0.0), mask=inside)
    tl.store(labels + row, tl.where(kept, label, -1).to(tl.int32), mask=inside)


@triton.jit
def _slope(
    hidden, weight, bias, class_weight, factors, labels, first, start, M, V, C, h_stride, w_stride, softcap,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, made again, and its |softmax - onehot|; both 0 past the last row and class."""
    row, column = first + tl.arange(0, BM), start + tl.arange(0, BN)
    inside, real = row < M, column < V
    row, column = tl.where(inside, row, 0), tl.where(real, column, 0)
    z = _product(
            hidden, weight, bias, first, start, M, V, h_stride, w_stride, C, HAS_BIAS, PRECISION, EVEN, BM, BN, BK
        )  # fmt: skip
    z = capped(z, softcap, CAP)
    lse = tl.load(factors + row, mask=inside, other=float("inf"))
    push = tl.load(factors + M + row, mask=inside, other=0.0)
    own = tl.load(factors + M * 2 + row, mask=inside, other=0.0)
    mine = column[None, :] == tl.load(labels + row, mask=inside, other=-1)[:, None]
    p = exp(z - lse[:, None])
    d = p * push[:, None]
    q = p
    if SMOOTH:
        spread = tl.load(factors + M * 3 + row, mask=inside, other=0.0)[:, None]
        if HAS_WEIGHT:
            d -= tl.load(class_weight + column).to(tl.float32)[None, :] * spread
            own_spread = tl.load(class_weight + column).to(tl.float32)[None, :] * spread
        else:
            d -= spread
            own_spread = spread
        d = tl.where(mine, own[:, None] - own_spread, d)
    else:
        d = tl.where(mine, own[:, None], d)
    if CAP:
        d *= cap_slope(z, softcap)
    return tl.where(real[None, :], d, 0.0), tl.where(real[None, :], tl.where(mine, 1.0 - q, q), 0.0)


@triton.jit
def _add(
    into, into_first, into_rows, d, b, b_first, b_rows, b_stride, C, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """into[into_first ...] += d @ b[b_first ...], or d.T @, BC columns at a time: sums of this program alone."""
    left = d.to(b.dtype.element_ty)
    if TRANSPOSED:
        left = tl.trans(left)
    row = tl.arange(0, BA)
    real = (into_first + row < into_rows)[:, None]
    c = tl.arange(0, BC)[None, :]
    at = into + tl.cast(into_first, tl.int64) * C + (row[:, None] * C + c)
    b_at = b + tl.cast(b_first, tl.int64) * b_stride + (_local(b_first, b_rows, BB)[:, None] * b_stride + c)
    for start in range(0, C, BC):
        right = tl.load(b_at + start, mask=c < C - start, other=0.0)
        mask = real & (c < C - start)
        share = tl.dot(left, right, input_precision=PRECISION)
        tl.store(at + start, tl.load(at + start, mask=mask, other=0.0) + share, mask=mask)


@triton.jit
def _largest(q):
    """Of a tile. In one reduction: Triton 3.6 cannot compile one after the other for sm_100."""
    return tl.max(tl.ravel(q), 0)


@triton.jit
def _dhidden(
    hidden, weight, bias, class_weight, factors, labels, sums, M, V, C, h_stride, w_stride, softcap, filter, row_blocks,
    span, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr,
    FILTER: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) % row_blocks * BM
    split = tl.program_id(0) // row_blocks
    sums += split.to(tl.int64) * M * C
    begin = split * span
    for start in range(begin, tl.minimum(begin + span, V), BN):
        d, q = _slope(
            hidden, weight, bias, class_weight, factors, labels, first, start, M, V, C, h_stride, w_stride, softcap,
            HAS_BIAS, HAS_WEIGHT, SMOOTH, CAP, PRECISION, EVEN, BM, BN, BK,
        )  # fmt: skip
        wanted = True
        if FILTER:
            wanted = _largest(q) >= filter
        if wanted:
            _add(sums, first, M, d, weight, start, V, w_stride, C, False, PRECISION, BM, BN, BC)
        tl.debug_barrier()  # what a thread loads next another may have stored


@triton.jit
def _dweight(
    hidden, weight, bias, class_weight, factors, labels, sums, M, V, C, h_stride, w_stride, softcap, filter,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, FILTER: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of BN classes' weights, or of their biases (BIAS): both at once do not fit the registers."""
    start = tl.program_id(0) * BN
    for first in range(0, M, BM):
        d, q = _slope(
            hidden, weight, bias, class_weight, factors, labels, first, start, M, V, C, h_stride, w_stride, softcap,
            HAS_BIAS, HAS_WEIGHT, SMOOTH, CAP, PRECISION, EVEN, BM, BN, BK,
        )  # fmt: skip
        wanted = True
        if FILTER:
            wanted = _largest(q) >= filter
        if wanted:
            if BIAS:
                column = start + tl.arange(0, BN)
                before = tl.load(sums + column, mask=column < V, other=0.0)
                tl.store(sums + column, before + tl.sum(d, 0), mask=column < V)
            else:
                _add(sums, start, V, d, hidden, first, M, h_stride, C, True, PRECISION, BN, BM, BC)
        tl.debug_barrier()  # what a thread loads next another may have stored


# --- launches --------------------------------------------------------------------------------------------------------


def _plain(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def _config(hidden: Tensor) -> dict[str, object]:
    """Constants of the products. float32 products keep float32's digits, by three TF32 products, unless torch was told
    that one will do."""
    full = hidden.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    BK = 64 if hidden.itemsize == 2 else 32
    return {"PRECISION": "tf32x3" if full else "tf32", "EVEN": hidden.shape[1] % BK == 0, "BK": BK}


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, option: Options, loss: Tensor, stats: Tensor
) -> None:
    """Fills loss (M,) and stats (3, M); weight has the dtype of hidden."""
    (M, C), V = hidden.shape, weight.shape[0]
    if M == 0:
        return
    hidden, weight = _plain(hidden), _plain(weight)
    tile = TILE[hidden.itemsize]
    row_blocks = cdiv(M, tile)
    splits = max(1, min(cdiv(V, tile), cdiv(4 * target(hidden).sms, row_blocks)))
    span = cdiv(cdiv(V, tile), splits) * tile
    splits = cdiv(V, span)
    partials, own = empty((M, splits, 3), hidden, torch.float32), empty((M,), hidden, torch.float32)
    smooth = option.label_smoothing != 0.0
    launch(
        _forward, (row_blocks * splits,), hidden, weight, bias, labels, option.weight, partials, own, M, V, C,
        hidden.stride(0), weight.stride(0), labels.stride(0), option.ignore_index, option.softcap or 1.0, row_blocks,
        splits, span, HAS_BIAS=bias is not None, HAS_WEIGHT=option.weight is not None, SMOOTH=smooth,
        CAP=option.softcap is not None, **_config(hidden), BM=tile, BN=tile, num_warps=8, num_stages=3,
    )  # fmt: skip
    block = max(16, next_power_of_2(splits))
    rows = max(1, 512 // block)
    launch(
        _join, (cdiv(M, rows),), labels, option.weight, option.weight_sum, partials, own, loss, stats, M, V,
        labels.stride(0), stats.stride(0), option.ignore_index, option.label_smoothing, option.z_loss, splits,
        HAS_WEIGHT=option.weight is not None, SUM_IS_POINTER=isinstance(option.weight_sum, Tensor), SMOOTH=smooth,
        Z_LOSS=option.z_loss != 0.0, ROWS=rows, BLOCK=block, num_warps=1,
    )  # fmt: skip


def backward(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    option: Options,
    total: Tensor | None,
    stats: Tensor,
    filter: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden in its dtype, dweight and dbias in float32, empty where not needed; dy is () or (M,) of any stride."""
    (M, C), V = hidden.shape, weight.shape[0]
    hidden, weight = _plain(hidden), _plain(weight)
    dweight = empty((V, C) if needs[1] else (0,), hidden, torch.float32).zero_()
    dbias = empty((V,) if needs[2] else (0,), hidden, torch.float32).zero_()
    if M == 0:
        return empty((0, C) if needs[0] else (0,), hidden), dweight, dbias
    tile = TILE[hidden.itemsize]
    smooth, has_weight = option.label_smoothing != 0.0, option.weight is not None
    factors, where = empty((4, M), hidden, torch.float32), empty((M,), hidden, torch.int32)
    launch(
        _factors, (cdiv(M, 128),), labels, option.weight, option.weight_sum, dy, total, stats, factors, where, M, V,
        labels.stride(0), dy.stride(0) if dy.dim() else 0, stats.stride(0), option.ignore_index, option.label_smoothing,
        option.z_loss, HAS_WEIGHT=has_weight, SUM_IS_POINTER=isinstance(option.weight_sum, Tensor),
        MEAN=total is not None, SMOOTH=smooth, Z_LOSS=option.z_loss != 0.0, BLOCK=128, num_warps=4,
    )  # fmt: skip
    sizes = (M, V, C, hidden.stride(0), weight.stride(0), option.softcap or 1.0, filter or 0.0)
    constants = {
        "HAS_BIAS": bias is not None, "HAS_WEIGHT": has_weight, "SMOOTH": smooth, "CAP": option.softcap is not None,
        "FILTER": filter is not None, **_config(hidden), "BM": tile, "BN": tile, "BC": 64,
    }  # fmt: skip
    for sums, is_bias in ((dweight, False), (dbias, True)):
        if needs[1 + is_bias]:
            launch(
                _dweight, (cdiv(V, tile),), hidden, weight, bias, option.weight, factors, where, sums, *sizes,
                BIAS=is_bias, **constants, num_warps=8, num_stages=3,
            )  # fmt: skip
    if not needs[0]:
        return empty((0,), hidden), dweight, dbias
    row_blocks, tiles = cdiv(M, tile), cdiv(V, tile)
    splits = max(1, min(tiles, target(hidden).sms // row_blocks))
    span = cdiv(tiles, splits) * tile
    splits = cdiv(V, span)
    sums = empty((splits, M, C), hidden, torch.float32).zero_()
    launch(
        _dhidden, (row_blocks * splits,), hidden, weight, bias, option.weight, factors, where, sums, *sizes, row_blocks,
        span, **constants, num_warps=8, num_stages=3,
    )  # fmt: skip
    return (sums[0] if splits == 1 else sums.sum(0)).to(hidden.dtype), dweight, dbias
