"""forward() and backward() of attention in plain PyTorch. Holds S x T tensors; the kernels do not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.reference import _random, wide


def like(x: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (*x.shape[:-1], size) with x's order of heads and positions: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, s, h, size), dtype=dtype).transpose(1, 2)
    return x.new_empty((b, h, s, size), dtype=dtype)


def kept(seed: Tensor, dropout: float, b: int, h: int, s: int, t: int, keys: Tensor | None = None) -> Tensor:
    """(B, H, S, T), False where dropped. Bit for bit the mask of every backend.

    It takes the number of the row, (b * H + h) * S + s, and that of the key: `keys` (T,), or its index. Packed
    sequences count rows through the whole pack and keys from the start of their sequence.
    """
    keys = torch.arange(t, device=seed.device) if keys is None else keys
    return _random.kept(seed, dropout, b * h * s, keys).view(b, h, s, t)


class _Rows(NamedTuple):
    """Where queries and keys stand, and what that alone lets them see."""

    queries: Tensor
    """(S,) position of a query on the axis of the keys: its own number + the offset of the alignment."""
    keys: Tensor
    """(T,) number of a key in its sequence."""
    same: Tensor | None
    """(S, T), whether query and key are of one sequence; None where there is but one."""
    past: Tensor | None
    """(S,), rows behind the last sequence."""


def _rows(s: int, t: int, causal: int, cu_q: Tensor | None, cu_k: Tensor | None, device: torch.device) -> _Rows:
    if cu_q is None or cu_k is None:
        offset = t - s if causal == 2 else 0
        return _Rows(torch.arange(s, device=device) + offset, torch.arange(t, device=device), None, None)
    numbered = []
    for cu, total in ((cu_q, s), (cu_k, t)):
        row = torch.arange(total, device=device, dtype=cu.dtype)
        sequence = torch.searchsorted(cu[1:], row, right=True)  # N behind the last one
        numbered += [sequence, row - cu[sequence]]
    of_query, queries, of_key, keys = numbered
    past = of_query == cu_q.shape[0] - 1
    if causal == 2:
        offsets = torch.nn.functional.pad(cu_k.diff() - cu_q.diff(), (0, 1))
        queries = queries + offsets[of_query]
    same = (of_query.unsqueeze(1) == of_key) & ~past.unsqueeze(1)
    return _Rows(queries, keys, same, past)


class _Logits(NamedTuple):
    x: Tensor
    """(B, Hk, G, S, T), -inf where not seen."""
    seen: Tensor | None
    """Which keys each query sees, where it may not see all; broadcastable to x."""
    slope: Tensor | None
    """Derivative of the softcap."""
    rows: _Rows


def _logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    documents_q: Tensor | None,
    documents_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> _Logits:
    (b, h, s, d), (hk, t) = q.shape, k.shape[1:3]
    rows = _rows(s, t, causal, cu_seqlens_q, cu_seqlens_k, q.device)
    x = wide(q).reshape(b, hk, h // hk, s, d) @ wide(k).unsqueeze(2).mT * scale
    slope = None
    if softcap > 0:
        x = (x / softcap).tanh()
        slope = 1 - x.square()
        x = x * softcap
    limits = [] if rows.same is None else [rows.same]
    if mask is not None:
        m = mask.expand(b, h, s, t).unflatten(1, (hk, h // hk))
        limits.append(m if m.dtype is torch.bool else m != -torch.inf)
        x = x if m.dtype is torch.bool else x + m.to(x.dtype)
    distance = rows.queries.unsqueeze(1) - rows.keys
    if alibi_slopes is not None:
        x = x - alibi_slopes.to(x.dtype).reshape(-1, hk, h // hk, 1, 1) * distance.abs()
    if causal:
        limits.append(distance >= 0)
    if window_left >= 0:
        limits.append(distance <= window_left)
    if window_right >= 0:
        limits.append(distance >= -window_right)
    if documents_q is not None and documents_k is not None:
        limits.append((documents_q.unsqueeze(2) == documents_k.unsqueeze(1)).view(b, 1, 1, s, t))
    seen = None
    for limit in limits:
        seen = limit if seen is None else seen & limit
    return _Logits(x if seen is None else x.masked_fill(~seen, -torch.inf), seen, slope, rows)


def _drop(p: Tensor, seed: Tensor | None, dropout: float, keys: Tensor) -> Tensor:
    if dropout == 0:
        return p
    assert seed is not None
    b, hk, g, s, t = p.shape
    return p * kept(seed, dropout, b, hk * g, s, t, keys).view(p.shape) / (1 - dropout)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    documents_q: Tensor | None,
    documents_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    (b, h, s, _), hk, dv = q.shape, k.shape[1], v.shape[-1]
    x, seen, _, rows = _logits(q, k, mask, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k,
                               causal, window_left, window_right, softcap, scale)  # fmt: skip
    lse = x.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(hk, h // hk, 1))
    if rows.past is not None:
        lse = lse.masked_fill(rows.past, -torch.inf)
    p = _drop((x - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp(), seed, dropout, rows.keys)
    vf = wide(v).unsqueeze(2)
    if seen is None:
        y = p @ vf
    else:  # 0 * NaN is NaN: a value that no query may see must not reach one
        fine = vf.isfinite()
        y = p @ vf.where(fine, 0)
        spoiled = seen.to(p.dtype).expand(p.shape) @ (~fine).to(p.dtype)
        y = y.masked_fill(spoiled > 0, torch.nan)
    out = like(q, dv)
    out.copy_(y.reshape(b, h, s, dv))
    return out, lse.reshape(b, h, s)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    documents_q: Tensor | None,
    documents_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, h, s, d), (hk, t) = q.shape, k.shape[1:3]
    groups = (b, hk, h // hk, s)
    x, seen, slope, rows = _logits(q, k, mask, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k,
                                   causal, window_left, window_right, softcap, scale)  # fmt: skip
    nothing = (lse == -torch.inf).view(groups)
    shift = lse.view(groups).masked_fill(nothing, torch.inf)
    p = (x - shift.unsqueeze(-1)).exp()
    if seen is not None:
        p = p.masked_fill(~seen, 0)  # in a row that sees NaN, too
    g, qf = wide(dout).reshape(*groups, v.shape[-1]), wide(q).reshape(*groups, d)
    if rows.past is not None:  # whatever stands there
        g, qf = (z.masked_fill(rows.past.unsqueeze(1), 0) for z in (g, qf))
    delta = (g * wide(out).reshape(g.shape)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.reshape(groups)
    delta = delta.masked_fill(nothing, 0)
    dp = _drop(g @ wide(v).unsqueeze(2).mT, seed, dropout, rows.keys)
    ds = p * (dp - delta.unsqueeze(-1))
    kf = wide(k).unsqueeze(2)
    if seen is not None:
        ds = ds.masked_fill(~seen, 0)
        kf = kf.where(kf.isfinite(), 0)
    dx = ds if slope is None else ds * slope
    if slope is not None and seen is not None:
        dx = dx.masked_fill(~seen, 0)  # the slope of what is not seen may be NaN
    dq, dk, dv = like(q, d), like(k, d), like(v, v.shape[-1])
    dq.copy_((dx @ kf * scale).reshape(q.shape))
    dk.copy_((dx.mT @ qf * scale).sum(2))
    dv.copy_((_drop(p, seed, dropout, rows.keys).mT @ g).sum(2))
    dbias, dsinks = lse.new_empty(0), lse.new_empty(0)
    if needs_bias:
        assert mask is not None
        dbias = ds.reshape(b, h, s, t).sum_to_size(mask.shape).contiguous()
    if sinks is not None:
        weight = (sinks.to(lse.dtype).view(hk, h // hk, 1) - shift).exp()
        dsinks = -(weight * delta).sum((0, 3)).reshape(h)
    return dq, dk, dv, dbias, dsinks
