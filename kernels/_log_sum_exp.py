"""What every cross-entropy kernel computes from a row's logits: softcap, and loss and gradient from the row's sums.

The label's own logit is kept out of the running sum ("rest"): 1 - softmax(z)[t] = rest / (rest + exp(z[t] - largest))
then loses no digits where the row is nearly certain, and neither does the log of the sum.

A tensor stands left of a constant: the interpreter cannot multiply a constexpr by a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm.kernels._activation import LOG2_E, tanh


@triton.jit
def exp(x):
    """tl.exp keeps denormal results, at three instructions more for each."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """z = softcap * tanh(x / softcap), or x."""
    if CAP:
        return tanh(x / softcap, True) * softcap
    return x


@triton.jit
def cap_slope(z, softcap):
    """dz/dx from z."""
    u = z / softcap
    return 1.0 - u * u


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to the last digits also where 1 + x loses them: 2 atanh(x / (2 + x)) below 1/4."""
    s = x / (x + 2.0)
    q = s * s
    series = s * (q * (q * (q * (q * 0.2222222222 + 0.2857142857) + 0.4) + 0.6666666667) + 2.0)
    return tl.where(x < 0.25, series, tl.log(x + 1.0))


@triton.jit
def finite_or_zero(top):
    """What to subtract from logits whose maximum so far is top: minus infinity less itself would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def labelled(label, weight, classes, ignore_index, HAS_WEIGHT: tl.constexpr):
    """kept, the label or 0 where it is ignored or out of range, and the row's weight: 0, or NaN out of range."""
    kept = label != ignore_index
    right = (label >= 0) & (label < classes)
    label = tl.where(kept & right, label, 0)
    if HAS_WEIGHT:
        row = tl.load(weight + label).to(tl.float32)
    else:
        row = tl.where(kept, 1.0, 0.0)
    row = tl.where(kept, tl.where(right, row, float("nan")), 0.0)
    return kept, label, row


@triton.jit
def row_loss(
    top_rest, rest, own, pivot, pulled, weight_sum, kept, row, smoothing, share, z_loss, SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
):  # fmt: skip
    """A row's loss and stats: the largest z, the log of the sum of exp(z - largest), 1 - softmax(z)[t]; all 0 where the
    row does not count.

    Args:
        top_rest, rest: largest logit without the label's, and the sum of exp(z - top_rest) over those; both 0 classes:
            minus infinity and 0.
        own: the label's logit.
        pivot, pulled: under smoothing sum_c w[c] * (z[c] - pivot), pivot being own where that is finite.
        weight_sum: sum_c w[c].
        share: smoothing / V.
    """
    top = tl.maximum(top_rest, own)
    rest = rest * exp(top_rest - top)
    e = exp(own - top)
    log_sum = log1p(tl.where(own >= top_rest, rest, (rest - 1.0) + e))
    rest_share = rest / (rest + e)
    loss = row * (1.0 - smoothing) * ((top - own) + log_sum)
    if SMOOTH:
        loss += (weight_sum * ((top - pivot) + log_sum) - pulled) * share
    if Z_LOSS:
        lse = top + log_sum
        loss += row * lse * lse * z_loss
    return (
        tl.where(kept, loss, 0.0), tl.where(kept, top, 0.0), tl.where(kept, log_sum, 0.0),
        tl.where(kept, rest_share, 0.0),
    )  # fmt: skip


@triton.jit
def row_gradient(
    top, log_sum, weight_sum, row, scale, smoothing, share, z_loss, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr
):
    """Factors of a row's gradient: dz[c] = push * p[c] - spread * w[c], at the label
    dz[t] = extra * p[t] - pull * (1 - p[t]) - spread * w[t]."""
    pull = row * (1.0 - smoothing) * scale
    extra = pull * 0.0
    if SMOOTH:
        extra += weight_sum * share * scale
    if Z_LOSS:
        extra += row * (top + log_sum) * (z_loss * 2.0) * scale
    return pull + extra, extra, pull, scale * share
