"""The backward kernels of attention; attention.py describes them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels._attention_common import (
    INF,
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
def prepare(
    dout, out, lse, dlse, sinks, shift, delta, dsinks, grad_batch, grad_head, grad_row, out_batch, out_head, out_row,
    heads, len_q, tiles, DV: tl.constexpr, M: tl.constexpr, WIDTH_V: tl.constexpr, DLSE: tl.constexpr,
    SINKS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) - dlse; lse in units of logits, +inf where a row sees nothing: its weights are 0."""
    program = tl.program_id(0)
    tile, pair = program % tiles, program // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * M + tl.arange(0, M)
    inside = row < len_q
    at = pair.to(tl.int64) * len_q + row
    first = batch * 0 + tile * M
    grad = rows_at(dout + batch * grad_batch + head * grad_head + first * grad_row, grad_row, len_q - tile * M, DV, M,
                   WIDTH_V, True)  # fmt: skip
    y = rows_at(out + batch * out_batch + head * out_head + first * out_row, out_row, len_q - tile * M, DV, M, WIDTH_V,
                True)  # fmt: skip
    d = tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)
    if DLSE:
        d -= tl.load(dlse + at, mask=inside, other=0.0).to(tl.float32)
    total = in_units(tl.load(lse + at, mask=inside, other=-INF), PRECISE)
    blind = total == -INF
    total = tl.where(blind, INF, total)
    d = tl.where(blind, 0.0, d)
    tl.store(shift + at, total, mask=inside)
    tl.store(delta + at, d, mask=inside)
    if SINKS:
        sink = in_units(tl.load(sinks + head).to(tl.float32), PRECISE)
        part = tl.sum(power(sink - total, PRECISE) * d, 0)
        tl.store(dsinks + program, -part)


@triton.jit
def clear(x, lse, cu_seqlens, batches, head_stride, row_stride, length, D: tl.constexpr, ROWS: tl.constexpr,
          WIDTH: tl.constexpr, LSE: tl.constexpr):  # fmt: skip
    """Rows of packed sequences behind the last one: 0, and -inf for lse."""
    first = (tl.program_id(0) * ROWS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    used = tl.load(cu_seqlens + batches)
    if first + ROWS <= used:
        return
    row = first + tl.arange(0, ROWS)
    inside = (row >= used) & (row < length)
    column = tl.arange(0, WIDTH)[None, :]
    at = x + head * head_stride + row[:, None] * row_stride + column
    tl.store(at, tl.zeros((ROWS, WIDTH), x.dtype.element_ty), mask=inside[:, None] & (column < D))
    if LSE:
        tl.store(lse + head * length + row, tl.full((ROWS,), -INF, tl.float32), mask=inside)


# --- dK and dV -------------------------------------------------------------------------------------------------------


@triton.jit
def _walk_queries(
    dk, dv, key, value, q, q_row, dout, grad_row, shift, delta, row, origin, start, stop, j, seed, len_q, len_k,
    before, after, distance, mask, mask_m, mask_n, slope, documents, doc_j, threshold, keep_factor, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    EDGE: tl.constexpr, BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries start ... stop of one head give to dK and dV of a tile of keys; tiles keys by queries."""
    CUT: tl.constexpr = EDGE and BOUND_M
    HIDES: tl.constexpr = (EDGE and (BEFORE or AFTER or DOCUMENTS)) or MASK > 0
    q_at = q + (origin + start) * q_row
    grad_at = dout + (origin + start) * grad_row
    for m in tl.range(start, stop, M):
        query_number = m + tl.arange(0, M)
        i = query_number[None, :]
        query = rows_at(q_at, q_row, len_q - m, D, M, WIDTH, CUT)
        x = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        if CUT:
            total = tl.load(shift + row + query_number, mask=query_number < len_q, other=INF)
        else:
            total = tl.load(shift + row + query_number)
        doc_i = doc_j
        if DOCUMENTS and EDGE:
            doc_i = tl.load(documents + query_number, mask=query_number < len_q, other=0)[None, :]
        x, steep = logits(x, i, j, len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, doc_i, doc_j,
                          factor, softcap, EDGE, BEFORE, AFTER, False, CUT, BOUND_N, MASK, MASK_M, MASK_N, ALIBI,
                          DOCUMENTS, SOFTCAP, PRECISE, FOLD)  # fmt: skip
        if FOLD:
            p = power(x * factor - total[None, :], PRECISE)
        else:
            p = power(x - total[None, :], PRECISE)
        grad = rows_at(grad_at, grad_row, len_q - m, DV, M, WIDTH_V, CUT)
        dp = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            low, high = row_keys(tl.load(seed), (row + query_number)[None, :])
            keep = kept(low, high, j, threshold)
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_factor, 0.0)
        dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if CUT:
            d = tl.load(delta + row + query_number, mask=query_number < len_q, other=0.0)
        else:
            d = tl.load(delta + row + query_number)
        ds = p * (dp - d[None, :])
        if SOFTCAP:
            ds *= steep
        if HIDES:
            ds = tl.where(p == 0.0, 0.0, ds)
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
        q_at += M * q_row
        grad_at += M * grad_row
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, mask, seed, slopes, documents_q, documents_k, ranges, cu_q, cu_k, dout, shift, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_m, mask_n,
    grad_batch, grad_head, grad_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, slope_batch,
    batches, kv_heads, group, len_q, len_k, tiles, span, left, right, factor, softcap, threshold, keep_factor, scale,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, ALIGN_END: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: over the query heads that share it, and the queries that see it."""
    tile, pair = place(tiles, span, batches * kv_heads)
    first = tile * N
    batch, kv_head = pair // kv_heads, pair % kv_heads
    total_q = len_q
    start_q, len_q = extent(cu_q, batch, len_q, VARLEN)
    start_k, len_k = extent(cu_k, batch, len_k, VARLEN)
    if VARLEN:
        if first >= len_k:
            return
        batch = 0 * batch
    distance = 0 * first
    if ALIGN_END:
        distance = len_k - len_q + distance
    before, after = left - distance, right + distance
    origin = 0 * batch.to(tl.int64)
    wide_batch = origin + batch
    k += wide_batch * k_batch + (origin + kv_head) * k_head + (origin + start_k + first) * k_row
    v += wide_batch * v_batch + (origin + kv_head) * v_head + (origin + start_k + first) * v_row
    q += wide_batch * q_batch + (origin + start_q) * q_row
    dout += wide_batch * grad_batch + (origin + start_q) * grad_row
    key_number = first + tl.arange(0, N)
    j = key_number[:, None]
    doc_j = j
    documents = documents_q
    if DOCUMENTS:
        doc_j = tl.load(documents_k + wide_batch * len_k + key_number, mask=key_number < len_k, other=0)[:, None]
        documents += wide_batch * len_q
    # Key j is seen by queries j - after ... j + before.
    lowest, middle, end, highest = seen_range(first, len_k, len_q, after, before, N, M, AFTER, BEFORE)
    if DOCUMENTS:
        lowest, middle, end, highest = narrowed(ranges, wide_batch * tiles + tile, lowest, middle, end, highest, M)
    HALF: tl.constexpr = M // 2 if M > 32 else M  # masks take registers: tiles that have some are smaller
    key = rows_at(k, k_row, len_k - first, D, N, WIDTH, BOUND_N)
    value = rows_at(v, v_row, len_k - first, DV, N, WIDTH_V, BOUND_N)
    sum_k = tl.zeros((N, WIDTH), tl.float32)
    sum_v = tl.zeros((N, WIDTH_V), tl.float32)
    for member in tl.range(0, group, num_stages=1):
        head = origin + kv_head * group + member
        q_here = q + head * q_head
        grad_here = dout + head * grad_head
        row = (wide_batch * kv_heads * group + head) * total_q + start_q
        mask_here = mask
        if MASK > 0:
            mask_here += wide_batch * mask_batch + head * mask_head
        slope = 0.0
        if ALIBI:
            slope = in_units(tl.load(slopes + wide_batch * slope_batch + head), PRECISE)
        if AFTER or DOCUMENTS:
            sum_k, sum_v = _walk_queries(
                sum_k, sum_v, key, value, q_here, q_row, grad_here, grad_row, shift, delta, row, origin, lowest,
                tl.minimum(middle, highest), j, seed, len_q, len_k, before, after, distance, mask_here, mask_m, mask_n,
                slope, documents, doc_j, threshold, keep_factor, factor, softcap, D, DV, HALF, WIDTH, WIDTH_V, True,
                BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD,
                PRECISE, PRECISION)  # fmt: skip
        sum_k, sum_v = _walk_queries(
            sum_k, sum_v, key, value, q_here, q_row, grad_here, grad_row, shift, delta, row, origin, middle, end, j,
            seed, len_q, len_k, before, after, distance, mask_here, mask_m, mask_n, slope, documents, doc_j, threshold,
            keep_factor, factor, softcap, D, DV, M, WIDTH, WIDTH_V, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK,
            MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
        if BEFORE or DOCUMENTS or BOUND_M:
            sum_k, sum_v = _walk_queries(
                sum_k, sum_v, key, value, q_here, q_row, grad_here, grad_row, shift, delta, row, origin,
                tl.maximum(middle, end), highest, j, seed, len_q, len_k, before, after, distance, mask_here, mask_m,
                mask_n, slope, documents, doc_j, threshold, keep_factor, factor, softcap, D, DV, HALF, WIDTH, WIDTH_V,
                True, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD,
                PRECISE, PRECISION)  # fmt: skip
    # Where to is computed here, so that it holds no registers above.
    dk += wide_batch * dk_batch + (origin + kv_head) * dk_head + (origin + start_k + first) * dk_row
    dv += wide_batch * dv_batch + (origin + kv_head) * dv_head + (origin + start_k + first) * dv_row
    store_rows(dk, dk_row, len_k - first, sum_k * scale, D, N, WIDTH, BOUND_N)
    store_rows(dv, dv_row, len_k - first, sum_v * keep_factor, DV, N, WIDTH_V, BOUND_N)


# --- dQ --------------------------------------------------------------------------------------------------------------


@triton.jit
def _logit_gradient(
    query, grad, total, d, k, k_row, v, v_row, low, high, n, i, len_q, len_k, before, after, distance, mask, mask_m,
    mask_n, slope, documents, doc_i, threshold, keep_factor, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    EDGE: tl.constexpr, STEEP: tl.constexpr, BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, queries by keys (STEEP: of those before the softcap), and the tile of keys."""
    CUT: tl.constexpr = EDGE and BOUND_N
    HIDES: tl.constexpr = (EDGE and (BEFORE or AFTER or DOCUMENTS or BOUND_N)) or MASK > 0
    key = n + tl.arange(0, N)
    j = key[None, :]
    tile = rows_at(k, k_row, len_k - n, D, N, WIDTH, CUT)
    x = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
    doc_j = doc_i
    if DOCUMENTS and EDGE:
        doc_j = tl.load(documents + key, mask=key < len_k, other=0)[None, :]
    x, steep = logits(x, i, j, len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, doc_i, doc_j,
                      factor, softcap, EDGE, BEFORE, AFTER, CUT, BOUND_M, CUT, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS,
                      SOFTCAP, PRECISE, FOLD)  # fmt: skip
    if FOLD:
        p = power(x * factor - total[:, None], PRECISE)
    else:
        p = power(x - total[:, None], PRECISE)
    value = rows_at(v, v_row, len_k - n, DV, N, WIDTH_V, CUT)
    dp = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(kept(low, high, j, threshold), dp * keep_factor, 0.0)
    ds = p * (dp - d[:, None])
    if SOFTCAP and STEEP:
        ds *= steep
    if HIDES:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds, tile


@triton.jit
def _walk_keys(
    dq, query, grad, total, d, k, k_row, v, v_row, low, high, origin, start, stop, i, len_q, len_k, before, after,
    distance, mask, mask_m, mask_n, slope, documents, doc_i, threshold, keep_factor, factor, softcap,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    EDGE: tl.constexpr, SPLIT: tl.constexpr, BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys start ... stop give to dQ of a tile of queries. SPLIT keeps keys that are not finite out."""
    k_at = k + (origin + start) * k_row
    v_at = v + (origin + start) * v_row
    for n in tl.range(start, stop, N):
        ds, tile = _logit_gradient(
            query, grad, total, d, k_at, k_row, v_at, v_row, low, high, n, i, len_q, len_k, before, after, distance,
            mask, mask_m, mask_n, slope, documents, doc_i, threshold, keep_factor, factor, softcap, D, DV, N, WIDTH,
            WIDTH_V, EDGE, True, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP,
            DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
        if SPLIT:
            tile = finite(tile)
        dq = tl.dot(ds.to(tile.dtype), tile, dq, input_precision=PRECISION)
        k_at += N * k_row
        v_at += N * v_row
    return dq


@triton.jit
def backward_queries(
    q, k, v, mask, seed, slopes, documents_q, documents_k, ranges, cu_q, cu_k, dout, shift, delta, dq,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_m, mask_n,
    grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row, slope_batch,
    batches, heads, group, len_q, len_k, tiles, span, left, right, factor, softcap, threshold, keep_factor, scale,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BOUND_M: tl.constexpr, BOUND_N: tl.constexpr, ALIGN_END: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr, FOLD: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, over the keys it sees."""
    tile, pair = place(tiles, span, batches * heads)
    if AFTER:
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
    origin = 0 * batch.to(tl.int64)
    wide_batch, wide_head = origin + batch, origin + head
    kv_head = wide_head // group
    q += wide_batch * q_batch + wide_head * q_head + (origin + start_q + first) * q_row
    dq += wide_batch * dq_batch + wide_head * dq_head + (origin + start_q + first) * dq_row
    dout += wide_batch * grad_batch + wide_head * grad_head + (origin + start_q + first) * grad_row
    k += wide_batch * k_batch + kv_head * k_head + (origin + start_k) * k_row
    v += wide_batch * v_batch + kv_head * v_head + (origin + start_k) * v_row
    row = (wide_batch * heads + head) * total_q + start_q
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
    grad = rows_at(dout, grad_row, len_q - first, DV, M, WIDTH_V, BOUND_M)
    total = tl.load(shift + row + query_number, mask=query_number < len_q, other=INF)
    d = tl.load(delta + row + query_number, mask=query_number < len_q, other=0.0)
    sums = tl.zeros((M, WIDTH), tl.float32)
    if BEFORE or DOCUMENTS:
        sums = _walk_keys(
            sums, query, grad, total, d, k, k_row, v, v_row, low, high, origin, lowest, tl.minimum(middle, highest), i,
            len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, documents, doc_i, threshold,
            keep_factor, factor, softcap, D, DV, N, WIDTH, WIDTH_V, True, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK,
            MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    sums = _walk_keys(
        sums, query, grad, total, d, k, k_row, v, v_row, low, high, origin, middle, end, i, len_q, len_k, before, after,
        distance, mask, mask_m, mask_n, slope, documents, doc_i, threshold, keep_factor, factor, softcap, D, DV, N,
        WIDTH, WIDTH_V, False, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP,
        DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    if AFTER or DOCUMENTS or BOUND_N:
        sums = _walk_keys(
            sums, query, grad, total, d, k, k_row, v, v_row, low, high, origin, tl.maximum(middle, end), highest, i,
            len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, documents, doc_i, threshold,
            keep_factor, factor, softcap, D, DV, N, WIDTH, WIDTH_V, True, False, BOUND_M, BOUND_N, BEFORE, AFTER, MASK,
            MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE, PRECISION)  # fmt: skip
    if BEFORE or AFTER or DOCUMENTS or MASK > 0:  # noqa: SIM102  as forward: a key that is not finite times 0
        if has_nan(sums):
            sums = _walk_keys(
                tl.zeros((M, WIDTH), tl.float32), query, grad, total, d, k, k_row, v, v_row, low, high, origin, lowest,
                highest, i, len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, documents, doc_i,
                threshold, keep_factor, factor, softcap, D, DV, N, WIDTH, WIDTH_V, True, True, BOUND_M, BOUND_N,
                BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, FOLD, PRECISE,
                PRECISION)  # fmt: skip
    store_rows(dq, dq_row, len_q - first, sums * scale, D, M, WIDTH, BOUND_M)


# --- gradient of the bias --------------------------------------------------------------------------------------------


@triton.jit
def backward_bias(
    q, k, v, mask, seed, slopes, documents_q, documents_k, dout, shift, delta, dbias,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_m, mask_n,
    grad_batch, grad_head, grad_row, slope_batch, heads, group, len_q, len_k, tiles_m, tiles_n, kept_heads,
    summed_batches, summed_heads, left, right, factor, softcap, threshold, keep_factor,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ALIGN_END: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr,
    MASK_N: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient of the masked logits. ROWS and KEYS: the result keeps queries, keys; else it sums them.

    With both a program sums its tile over summed_batches x summed_heads; with one it walks along the other.
    """
    program = tl.program_id(0)
    origin = 0 * program.to(tl.int64)
    tile_n = program % tiles_n if KEYS else 0 * program
    program = program // tiles_n if KEYS else program
    tile_m = program % tiles_m if ROWS else 0 * program
    outer = origin + (program // tiles_m if ROWS else program)
    first_batch = outer // kept_heads
    first_head = outer % kept_heads
    distance = 0 * tile_m
    if ALIGN_END:
        distance = len_k - len_q + distance
    before, after = left - distance, right + distance
    first_m, first_n = tile_m * M, tile_n * N
    if ROWS:
        low, _middle, _end, high = seen_range(first_m, len_q, len_k, before, after, M, N, BEFORE, AFTER)
        steps = (high - low + N - 1) // N
        if KEYS:
            steps = summed_batches * summed_heads
            if (first_n < low) | (first_n >= high):
                steps = 0 * steps
        else:
            first_n = low
    else:
        low, _middle, _end, high = seen_range(first_n, len_k, len_q, after, before, N, M, AFTER, BEFORE)
        steps = (high - low + M - 1) // M
        first_m = low
    sums = tl.zeros((M, N), tl.float32)
    for step in tl.range(0, steps):
        batch, head, m, n = first_batch, first_head, first_m, first_n
        if ROWS and KEYS:
            batch = first_batch + step // summed_heads
            head = first_head + step % summed_heads
        elif KEYS:
            m = first_m + step * M
        else:
            n = first_n + step * N
        query_number = m + tl.arange(0, M)
        i = query_number[:, None]
        inside = query_number < len_q
        row = (batch * heads + head) * len_q
        query = rows_at(q + batch * q_batch + head * q_head + (origin + m) * q_row, q_row, len_q - m, D, M, WIDTH,
                        True)  # fmt: skip
        grad = rows_at(dout + batch * grad_batch + head * grad_head + (origin + m) * grad_row, grad_row, len_q - m, DV,
                       M, WIDTH_V, True)  # fmt: skip
        total = tl.load(shift + row + query_number, mask=inside, other=INF)
        d = tl.load(delta + row + query_number, mask=inside, other=0.0)
        slope = 0.0
        if ALIBI:
            slope = in_units(tl.load(slopes + batch * slope_batch + head), PRECISE)
        doc_i = i
        documents = documents_k
        if DOCUMENTS:
            doc_i = tl.load(documents_q + batch * len_q + query_number, mask=inside, other=0)[:, None]
            documents += batch * len_k
        low_hash, high_hash = i, i
        if DROPOUT:
            low_hash, high_hash = row_keys(tl.load(seed), (row + query_number)[:, None])
        ds, _tile = _logit_gradient(
            query, grad, total, d, k + batch * k_batch + head // group * k_head + (origin + n) * k_row, k_row,
            v + batch * v_batch + head // group * v_head + (origin + n) * v_row, v_row, low_hash, high_hash, n, i,
            len_q, len_k, before, after, distance, mask + batch * mask_batch + head * mask_head, mask_m, mask_n, slope,
            documents, doc_i, threshold, keep_factor, factor, softcap, D, DV, N, WIDTH, WIDTH_V, True, False, True,
            True, BEFORE, AFTER, MASK, MASK_M, MASK_N, ALIBI, DOCUMENTS, SOFTCAP, DROPOUT, False, PRECISE,
            PRECISION)  # fmt: skip
        sums += ds
    row = first_m + tl.arange(0, M)
    key = first_n + tl.arange(0, N)
    if ROWS and KEYS:
        at = dbias + (outer * len_q + row[:, None]) * len_k + key[None, :]
        tl.store(at, sums, mask=(row[:, None] < len_q) & (key[None, :] < len_k))
    elif KEYS:
        tl.store(dbias + outer * len_k + key, tl.sum(sums, 0), mask=key < len_k)
    else:
        tl.store(dbias + outer * len_q + row, tl.sum(sums, 1), mask=row < len_q)
