"""The forward kernel of attention; attention.py describes it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels._attention_common import (
    INF,
    LN2,
    extent,
    finite,
    has_nan,
    in_units,
    logits,
    narrowed,
    place,
    power,
    rows_at,
    seen_range,
    store_rows,
)
from fastlm.kernels._random import kept, row_keys


@triton.jit
def _start(sinks, head, M: tl.constexpr, SINKS: tl.constexpr, PRECISE: tl.constexpr):
    """The largest logit and the sum of weights of no keys; a sink is a key without a value."""
    if SINKS:
        sink = in_units(tl.load(sinks + head).to(tl.float32), PRECISE)
        return tl.zeros((M,), tl.float32) + sink, tl.full((M,), 1.0, tl.float32)
    return tl.full((M,), -INF, tl.float32), tl.zeros((M,), tl.float32)


@triton.jit
def _walk(
    total, top, weight, query, k, k_row, v, v_row, origin, start, stop, i, len_q, len_k, before, after, distance,
    mask, mask_m, mask_n, slope, doc_i, documents, low, high, threshold, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    EDGE: tl.constexpr, SPLIT: tl.constexpr, BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys start ... stop, by tiles of N. SPLIT keeps values that are not finite out."""
    CUT: tl.constexpr = EDGE and BOUND_N
    k_at = k + (origin + start) * k_row
    v_at = v + (origin + start) * v_row
    for n in tl.range(start, stop, N):
        key = n + tl.arange(0, N)
        j = key[None, :]
        tile = rows_at(k_at, k_row, len_k - n, D, N, WIDTH, CUT)
        x = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
        doc_j = doc_i
        if DOCUMENTS and EDGE:
            doc_j = tl.load(documents + key, mask=key < len_k, other=0)[None, :]
        x, _ = logits(x, i, j, len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, doc_i, doc_j,
                      factor, softcap, EDGE, BEFORE, AFTER, CUT, BOUND_M, CUT, MASK, MASK_M, MASK_N, ALIBI,
                      DOCUMENTS, SOFTCAP, PRECISE, FOLD)  # fmt: skip
        highest = tl.max(x, 1)
        if FOLD:
            highest = highest * factor
        new_top = tl.maximum(top, highest)
        base = new_top
        if EDGE or MASK > 0:  # a row may have seen nothing yet
            base = tl.where(new_top == -INF, 0.0, new_top)
        if FOLD:
            x = x * factor
        p = power(x - base[:, None], PRECISE)
        shrink = power(top - base, PRECISE)
        weight = weight * shrink + tl.sum(p, 1)
        top = new_top
        if DROPOUT:
            p = tl.where(kept(low, high, j, threshold), p, 0.0)
        value = rows_at(v_at, v_row, len_k - n, DV, N, WIDTH_V, CUT)
        if SPLIT:
            value = finite(value)
        total = total * shrink[:, None]
        total = tl.dot(p.to(value.dtype), value, total, input_precision=PRECISION)
        k_at += N * k_row
        v_at += N * v_row
    return total, top, weight


@triton.jit
def _spoiled(
    total, v, v_row, origin, start, stop, i, len_q, len_k, before, after, mask, mask_m, mask_n, doc_i, documents,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH_V: tl.constexpr, BOUND_M: tl.constexpr,
    BOUND_N: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr,
    MASK_N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """How many values that are not finite each query sees, by column."""
    for n in tl.range(start, stop, N, num_stages=1):
        key = n + tl.arange(0, N)
        j = key[None, :]
        doc_j = doc_i
        if DOCUMENTS:
            doc_j = tl.load(documents + key, mask=key < len_k, other=0)[None, :]
        x, _ = logits(tl.zeros((M, N), tl.float32), i, j, len_q, len_k, before, after, 0, mask, mask_m, mask_n, 0.0,
                      doc_i, doc_j, 0.0, 0.0, True, BEFORE, AFTER, BOUND_N, BOUND_M, BOUND_N, MASK, MASK_M, MASK_N,
                      False, DOCUMENTS, False, False, True)  # fmt: skip
        value = rows_at(v + (origin + n) * v_row, v_row, len_k - n, DV, N, WIDTH_V, BOUND_N)
        seen = tl.where(x == -INF, 0.0, 1.0).to(tl.float16)
        bad = tl.where(tl.abs(value.to(tl.float32)) < INF, 0.0, 1.0).to(tl.float16)
        total = tl.dot(seen, bad, total)
    return total


@triton.jit
def forward(
    q, k, v, mask, seed, sinks, slopes, documents_q, documents_k, ranges, cu_q, cu_k, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_m, mask_n,
    out_batch, out_head, out_row, slope_batch, batches, heads, group, len_q, len_k, tiles, span, left, right,
    factor, softcap, threshold, keep_factor,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, ALIGN_END: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SINKS: tl.constexpr, VARLEN: tl.constexpr, FOLD: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, pair = place(tiles, span, batches * heads)
    if AFTER:  # the tiles that see most go first
        tile = tiles - 1 - tile
    first = tile * M
    batch, head = pair // heads, pair % heads
    total_q = len_q
    start_q, len_q = extent(cu_q, batch, len_q, VARLEN)
    start_k, len_k = extent(cu_k, batch, len_k, VARLEN)
    if VARLEN:
        if first >= len_q:
            return
        batch = 0 * batch
    distance = 0 * first
    if ALIGN_END:
        distance = len_k - len_q + distance
    before, after = left - distance, right + distance
    origin = 0 * batch.to(tl.int64)  # lifts offsets to 64 bits
    wide_head = origin + head
    wide_batch = origin + batch
    kv_head = wide_head // group
    q += wide_batch * q_batch + wide_head * q_head + (origin + start_q + first) * q_row
    k += wide_batch * k_batch + kv_head * k_head + (origin + start_k) * k_row
    v += wide_batch * v_batch + kv_head * v_head + (origin + start_k) * v_row
    out += wide_batch * out_batch + wide_head * out_head + (origin + start_q + first) * out_row
    row = (wide_batch * heads + head) * total_q + start_q  # of lse, and in dropout's hash
    query_number = first + tl.arange(0, M)
    i = query_number[:, None]
    if MASK > 0:
        mask += wide_batch * mask_batch + wide_head * mask_head
    slope = 0.0
    if ALIBI:
        slope = in_units(tl.load(slopes + wide_batch * slope_batch + head), PRECISE)
    doc_i = i
    documents = documents_k
    if DOCUMENTS:
        doc_i = tl.load(documents_q + wide_batch * len_q + query_number, mask=query_number < len_q, other=0)[:, None]
        documents += wide_batch * len_k
    low, high = i, i
    if DROPOUT:
        low, high = row_keys(tl.load(seed), (row + query_number)[:, None])

    lowest, middle, end, highest = seen_range(first, len_q, len_k, before, after, M, N, BEFORE, AFTER)
    if DOCUMENTS:
        lowest, middle, end, highest = narrowed(ranges, wide_batch * tiles + tile, lowest, middle, end, highest, N)
    query = rows_at(q, q_row, len_q - first, D, M, WIDTH, BOUND_M)
    total = tl.zeros((M, WIDTH_V), tl.float32)
    top, weight = _start(sinks, head, M, SINKS, PRECISE)
    if BEFORE or DOCUMENTS:
        total, top, weight = _walk(
            total, top, weight, query, k, k_row, v, v_row, origin, lowest, tl.minimum(middle, highest), i, len_q,
            len_k, before, after, distance, mask, mask_m, mask_n, slope, doc_i, documents, low, high, threshold,
            factor, softcap, D, DV, N, WIDTH, WIDTH_V, True, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M,
            MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    total, top, weight = _walk(
        total, top, weight, query, k, k_row, v, v_row, origin, middle, end, i, len_q, len_k, before, after, distance,
        mask, mask_m, mask_n, slope, doc_i, documents, low, high, threshold, factor, softcap, D, DV, N, WIDTH,
        WIDTH_V, False, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP,
        DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    if AFTER or DOCUMENTS or BOUND_N:
        total, top, weight = _walk(
            total, top, weight, query, k, k_row, v, v_row, origin, tl.maximum(middle, end), highest, i, len_q, len_k,
            before, after, distance, mask, mask_m, mask_n, slope, doc_i, documents, low, high, threshold, factor,
            softcap, D, DV, N, WIDTH, WIDTH_V, True, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N,
            ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip

    # A value that is not finite times a weight of 0 is NaN: only where that has happened, and a query may be blind to
    # a value of its tiles, the tile is computed again without such values, and they are put where they are seen.
    HIDES: tl.constexpr = BEFORE or AFTER or DOCUMENTS or MASK > 0
    spoiled = False
    if HIDES:
        spoiled = has_nan(total)
        if spoiled:
            total = tl.zeros((M, WIDTH_V), tl.float32)
            top, weight = _start(sinks, head, M, SINKS, PRECISE)
            total, top, weight = _walk(
                total, top, weight, query, k, k_row, v, v_row, origin, lowest, highest, i, len_q, len_k, before,
                after, distance, mask, mask_m, mask_n, slope, doc_i, documents, low, high, threshold, factor,
                softcap, D, DV, N, WIDTH, WIDTH_V, True, True, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N,
                ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    shown = keep_factor / tl.where(weight == 0.0, 1.0, weight)
    store_rows(out, out_row, len_q - first, total * shown[:, None], DV, M, WIDTH_V, BOUND_M)
    if PRECISE:
        top += tl.log(weight)
    else:
        top = (top + tl.log2(weight)) * LN2
    tl.store(lse + row + query_number, top, mask=query_number < len_q)
    if HIDES:  # noqa: SIM102
        if spoiled:
            tl.debug_barrier()  # of the block: these stores come after those
            bad = _spoiled(
                tl.zeros((M, WIDTH_V), tl.float32), v, v_row, origin, lowest, highest, i, len_q, len_k, before, after,
                mask, mask_m, mask_n, doc_i, documents, DV, M, N, WIDTH_V, BOUND_M, BOUND_N, BEFORE, AFTER, MASK,
                MASK_M, MASK_N, DOCUMENTS)  # fmt: skip
            column = tl.arange(0, WIDTH_V)[None, :]
            at = out + tl.arange(0, M)[:, None] * out_row + column
            nan = (bad + float("nan")).to(out.dtype.element_ty)
            tl.store(at, nan, mask=(bad > 0.0) & (i < len_q) & (column < DV))
