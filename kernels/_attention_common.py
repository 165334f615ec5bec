"""What the kernels of attention share: where a program stands, what it sees, a tile of logits.

Logits are kept in units of log2: exp2 is the instruction there is. With PRECISE, for float32, they stay natural: the
rounding of scale * log2(e) and of lse * log2(e) is as large an error there as all others. A tile may lie either way,
queries by rows (forward, dQ) or keys by rows (dK, dV): whoever calls gives the numbers of queries and keys in the shape
that broadcasts. What is walked over comes in three segments of whole tiles: one at the left edge of what is seen, the
middle where everything is seen and no mask is computed, and one at the right edge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels._activation import LOG2_E, tanh

LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.1219444005469057e-4)
"""ln 2 in two parts, the first exact in float32 and times an integer still exact."""
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def place(tiles, span, heads):
    """(tile, head) of this program: heads go in groups of `span` that share the cache, tile after tile within one."""
    number = tl.program_id(0)
    group = number // (tiles * span)
    rest = number % (tiles * span)
    width = tl.minimum(span, heads - group * span)
    return rest // width, group * span + rest % width


@triton.jit
def extent(cu_seqlens, batch, length, VARLEN: tl.constexpr):
    """(first row, rows) of a sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens + batch)
        return start, tl.load(cu_seqlens + batch + 1) - start
    return 0, length


@triton.jit
def rows_at(base, stride, count, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BOUND: tl.constexpr):
    """(ROWS, WIDTH) from `base` on; 0 from column `width` and, where BOUND, from row `count` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    at = base + row * stride + column
    if BOUND and width < WIDTH:
        return tl.load(at, mask=(row < count) & (column < width), other=0.0)
    if BOUND:
        return tl.load(at, mask=row < count, other=0.0)
    if width < WIDTH:
        return tl.load(at, mask=column < width, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(base, stride, count, value, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
               BOUND: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    at = base + row * stride + column
    value = value.to(base.dtype.element_ty)
    if BOUND and width < WIDTH:
        tl.store(at, value, mask=(row < count) & (column < width))
    elif BOUND:
        tl.store(at, value, mask=row < count)
    elif width < WIDTH:
        tl.store(at, value, mask=column < width)
    else:
        tl.store(at, value)


@triton.jit
def in_units(x, PRECISE: tl.constexpr):
    """A natural logit in the units of the kernels."""
    if PRECISE:
        return x
    return x * LOG2_E


@triton.jit
def power(x, PRECISE: tl.constexpr):
    """exp() of a difference of logits in these units."""
    if PRECISE:  # x * log2(e) alone would have all weights off to one side: by the constant's rounding, times x
        x = tl.where(x < -200.0, -200.0, x)
        n = tl.floor(x * LOG2_E + 0.5)
        return tl.exp2((x - n * LN2_HIGH - n * LN2_LOW) * LOG2_E) * tl.exp2(n)
    return tl.exp2(x)


@triton.jit
def finite(x):
    """x with 0 for NaN and infinities."""
    return tl.where(tl.abs(x.to(tl.float32)) < INF, x, tl.zeros_like(x))


@triton.jit
def has_nan(x):
    """Of a tile. One reduction: Triton 3.6 cannot compile one after the other for sm_100."""
    return tl.max(tl.ravel((x != x).to(tl.int32)), 0) > 0


# --- which tiles -----------------------------------------------------------------------------------------------------


@triton.jit
def seen_range(first, rows, other, before, after, ROWS: tl.constexpr, STEP: tl.constexpr, BEFORE: tl.constexpr,
               AFTER: tl.constexpr):  # fmt: skip
    """(low, middle, end of middle, high): what rows first ... of `rows` see of `other`, as far as positions say.

    Row r sees r - before ... r + after, both already shifted by the offset of the alignment. All but `high` are
    multiples of STEP.
    """
    last = tl.minimum(first + ROWS, rows) - 1
    low = 0 * first
    middle = 0 * first
    high = other + 0 * first
    end = high // STEP * STEP
    if AFTER:
        high = tl.minimum(high, tl.maximum(last + after + 1, 0))
        end = tl.minimum(end, tl.maximum(first + after + 1, 0) // STEP * STEP)
    if BEFORE:
        low = tl.maximum(first - before, 0) // STEP * STEP
        middle = (tl.maximum(last - before, 0) + STEP - 1) // STEP * STEP
    return low, middle, end, high


@triton.jit
def narrowed(ranges, index, low, middle, end, high, STEP: tl.constexpr):
    """The same within what document_ranges() wrote for a tile."""
    at = ranges + index * 4
    low = tl.maximum(low, tl.load(at) * STEP)
    middle = tl.maximum(middle, tl.load(at + 1) * STEP)
    end = tl.minimum(end, tl.load(at + 2) * STEP)
    high = tl.minimum(high, tl.load(at + 3) * STEP)
    return low, middle, end, high


@triton.jit
def document_ranges(ids, other_ids, ranges, length, other_length, tiles, SIZE: tl.constexpr, STEP: tl.constexpr,
                    MANY: tl.constexpr):  # fmt: skip
    """For a tile of SIZE ids: the first and the last of the other side's tiles of STEP ids with which it may share one,
    and the first run of tiles that hold its one id and nothing else. Sorted ids make these the tiles that are seen.
    """
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    at = program % tiles * SIZE + tl.arange(0, SIZE)
    mine = tl.load(ids + batch * length + at, mask=at < length, other=0)
    mine = tl.where(at < length, mine, tl.load(ids + batch * length + program % tiles * SIZE))
    lowest, highest = tl.min(mine, 0), tl.max(mine, 0)
    count = (other_length + STEP - 1) // STEP
    low = count + 0 * program
    high = 0 * program
    middle = count + 0 * program
    end = count + 0 * program
    for start in tl.range(0, count, MANY):
        tile = start + tl.arange(0, MANY)
        place = tile[:, None] * STEP + tl.arange(0, STEP)[None, :]
        inside = place < other_length
        theirs = tl.load(other_ids + batch * other_length + place, mask=inside, other=0)
        # Past the end the first id of the tile stands in.
        begin = tl.load(other_ids + batch * other_length + tile * STEP, mask=tile < count, other=0)
        theirs = tl.where(inside, theirs, begin[:, None])
        least, most = tl.min(theirs, 1), tl.max(theirs, 1)
        shares = (tile < count) & (least <= highest) & (most >= lowest)
        whole = shares & (least == most) & (lowest == highest)
        low = tl.minimum(low, tl.min(tl.where(shares, tile, count), 0))
        high = tl.maximum(high, tl.max(tl.where(shares, tile + 1, 0), 0))
        middle = tl.minimum(middle, tl.min(tl.where(whole, tile, count), 0))
        end = tl.minimum(end, tl.min(tl.where((tile > middle) & (~whole), tile, count), 0))
    at = ranges + program * 4
    tl.store(at, low)
    tl.store(at + 1, tl.minimum(middle, high))
    tl.store(at + 2, tl.minimum(end, high))
    tl.store(at + 3, high)


# --- logits ----------------------------------------------------------------------------------------------------------


@triton.jit
def logits(
    x, i, j, len_q, len_k, before, after, distance, mask, mask_m, mask_n, slope, doc_i, doc_j, factor, softcap,
    EDGE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, HIDE_PAST: tl.constexpr, BOUND_M: tl.constexpr,
    BOUND_N: tl.constexpr, MASK: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALIBI: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Logits from the products x = q k^T of queries i and keys j, -inf where not seen, and the slope of the softcap.

    Query i sees keys i - before ... i + after. With FOLD the result still lacks the factor, the scale in these units,
    which is then positive: the exponent takes it in one multiply-add. With SOFTCAP the factor is scale / softcap and
    `softcap` is in these units. EDGE: a tile of which not everything may be seen; HIDE_PAST: keys may end within it.
    """
    steep = x
    if SOFTCAP:
        t = tanh(x * factor, PRECISE)
        steep = 1 - t * t
        x = t * softcap
    elif not FOLD:
        x = x * factor
    if MASK > 0:
        at = mask
        if MASK_M:
            at = at + i.to(tl.int64) * mask_m
        if MASK_N:
            at = at + j.to(tl.int64) * mask_n
        if MASK_M and BOUND_M and MASK_N and BOUND_N:
            bias = tl.load(at, mask=(i < len_q) & (j < len_k), other=0)
        elif MASK_M and BOUND_M:
            bias = tl.load(at, mask=i < len_q, other=0)
        elif MASK_N and BOUND_N:
            bias = tl.load(at, mask=j < len_k, other=0)
        else:
            bias = tl.load(at)
        if MASK == 1:
            x = tl.where(bias, x, -INF)
        else:
            bias = bias.to(tl.float32)
            x = tl.where(bias == -INF, -INF, x + in_units(bias, PRECISE))
    if ALIBI:
        x = x - tl.abs(i + distance - j).to(tl.float32) * slope
    if EDGE:
        if HIDE_PAST:
            x = tl.where(j < len_k, x, -INF)
        if AFTER:
            x = tl.where(j <= i + after, x, -INF)
        if BEFORE:
            x = tl.where(j >= i - before, x, -INF)
        if DOCUMENTS:
            x = tl.where(doc_i == doc_j, x, -INF)
    return x, steep
