"""attention in Triton.

Forward: a program holds M queries of one head and walks over the keys they see by tiles of N: logits, the running
maximum and sum of the online softmax, weights times values. Backward recomputes the weights from lse: delta =
rowsum(dout * out) first, then a kernel that holds N keys and walks over queries and the query heads that share them
(dK, dV), and one that holds M queries and walks over keys (dQ). Seven products of tiles where five would do, but no
atomics: the same bits every time. Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.

Bytes: forward reads q once and k, v once a tile of queries (from the second-level cache: programs of one head run
together), writes out and lse. Logits, weights and masks never leave the registers; weights are there the left operand
of the next product. Backward's scratch is two float32 a query, and B * H * S (or T) where a bias is summed over keys
(or queries).

Which tiles: causal, window, ends of sequences and documents bound a walk, and split it where the masks are: tiles of
which everything is seen know no mask. Documents are bounded by a small kernel that compares the ids of tiles; where
they are not sorted, tiles without a common id are walked over too, and masked. What sees most is started first.

Values that no query may see, but which are NaN, would spoil 0 * NaN. A tile of queries whose result has a NaN, and that
may have hidden a value, is computed once more without such values, and they are put back where they are seen: this
costs those tiles twice their time and all others one test. Keys in dQ alike.

Tried and lost, on the evidence of registers alone: see _attention_configuration.py. Not tried: tensor descriptors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.kernels import _attention_backward, _attention_common, _attention_forward
from fastlm.kernels._attention_configuration import Config, configuration
from fastlm.kernels._launch import cdiv, empty, launch, next_power_of_2, target
from fastlm.kernels._random import threshold

LOG2_E = math.log2(math.e)
FAR = 1 << 30
"""A window that reaches everywhere."""
CACHE = 16 << 20
"""Bytes of keys and values that programs running at the same time may share in the second-level cache."""


def _dense(tensor: Tensor) -> Tensor:
    """Any strides but those of the last dimension, which is 1; offsets within a tile are 32 bits wide."""
    fine = (tensor.stride(3) == 1 or tensor.shape[3] <= 1) and tensor.stride(2) < 1 << 23
    return tensor if fine else tensor.contiguous()


def _like(x: Tensor, size: int) -> Tensor:
    """An empty (*x.shape[:-1], size) with x's order of heads and positions: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return empty((b, s, h, size), x).transpose(1, 2)
    return empty((b, h, s, size), x)


class _Problem(NamedTuple):
    """A call as the kernels take it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: Tensor | None
    slopes: Tensor | None
    documents_q: Tensor | None
    documents_k: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    longest_q: int
    longest_k: int
    mask_strides: tuple[int, ...]
    slope_batch: int
    left: int
    right: int
    scale: float
    factor: float
    softcap: float
    threshold: int
    keep_factor: float
    options: dict[str, Any]
    """The constants that do not depend on the configuration."""

    @property
    def batches(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    def configuration(self, direction: str) -> Config:
        width = max(self.options["WIDTH"], self.options["WIDTH_V"])
        used = ("MASK", "BEFORE", "ALIBI", "DOCUMENTS", "SOFTCAP", "DROPOUT", "VARLEN")
        plain = not any(self.options[name] for name in used)
        return configuration(target(self.q), direction, width, self.q.dtype, plain)

    def bounds(self, config: Config) -> dict[str, Any]:
        """The constants that do: tiles, and whether lengths end within one."""
        varlen = self.cu_q is not None
        return {
            "M": config.m, "N": config.n,
            "BOUND_M": varlen or self.q.shape[2] % config.m != 0,
            "BOUND_N": varlen or self.k.shape[2] % config.n != 0,
        }  # fmt: skip

    def span(self, length: int, heads: int) -> int:
        """Heads whose tiles are interleaved, longest first: as many as the cache holds the other side of."""
        if not self.options["AFTER"]:
            return 1
        bytes_a_head = length * (self.q.shape[3] + self.v.shape[3]) * self.q.itemsize
        return max(1, min(self.batches * heads, CACHE // max(bytes_a_head, 1)))

    def ranges(self, size: int, step: int, keys: bool) -> Tensor | None:
        """For each tile of `size` queries (of keys): which tiles of `step` on the other side it has documents of."""
        ids, others = self.documents_q, self.documents_k
        if ids is None or others is None:
            return None
        if keys:
            ids, others = others, ids
        (batch, length), other = ids.shape, others.shape[1]
        tiles = cdiv(length, size)
        ranges = empty((batch, tiles, 4), ids, torch.int32)
        many = min(next_power_of_2(cdiv(other, step)), 4096 // step)
        launch(_attention_common.document_ranges, (batch * tiles,), ids, others, ranges, length, other, tiles,
               SIZE=size, STEP=step, MANY=many, num_warps=4)  # fmt: skip
        return ranges


def _problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, slopes: Tensor | None,
    documents_q: Tensor | None, documents_k: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, longest_q: int,
    longest_k: int, causal: int, window_left: int, window_right: int, softcap: float, scale: float, dropout: float,
) -> _Problem:  # fmt: skip
    q, k, v = _dense(q), _dense(k), _dense(v)
    (b, h, s, d), (t, dv) = q.shape, v.shape[2:]
    exact = q.dtype is torch.float32
    full = exact and not (q.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    right = 0 if causal else window_right
    added = mask is not None and mask.dtype is not torch.bool
    fold = scale > 0 and softcap == 0 and slopes is None and not added
    unit = 1.0 if exact else LOG2_E
    options = {
        "D": d, "DV": dv, "WIDTH": max(16, next_power_of_2(d)), "WIDTH_V": max(16, next_power_of_2(dv)),
        "ALIGN_END": causal == 2, "BEFORE": window_left >= 0, "AFTER": right >= 0,
        "MASK": 0 if mask is None else 2 if added else 1,
        "MASK_M": mask is not None and mask.shape[2] > 1 and mask.stride(2) != 0,
        "MASK_N": mask is not None and mask.shape[3] > 1 and mask.stride(3) != 0,
        "ALIBI": slopes is not None, "DOCUMENTS": documents_q is not None, "SOFTCAP": softcap > 0,
        "DROPOUT": dropout > 0, "VARLEN": cu_q is not None, "FOLD": fold, "PRECISE": exact,
        "PRECISION": "tf32x3" if full else "tf32",
    }  # fmt: skip
    return _Problem(
        q, k, v, mask, seed, slopes, documents_q, documents_k, cu_q, cu_k,
        s if cu_q is None else longest_q, t if cu_k is None else longest_k,
        (0, 0, 0, 0) if mask is None else mask.expand(b, h, s, t).stride(),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        min(max(window_left, 0), FAR), min(max(right, 0), FAR), scale,
        scale / softcap if softcap > 0 else scale * unit, softcap * unit,
        threshold(dropout), 1 / (1 - dropout), options,
    )  # fmt: skip


def _clear(x: Tensor, lse: Tensor | None, cu: Tensor | None) -> None:
    """Rows of packed sequences behind the last one."""
    if cu is None:
        return
    _, heads, length, d = x.shape
    rows, width = 16, next_power_of_2(d)
    launch(_attention_backward.clear, (cdiv(length, rows), heads), x, lse, cu, cu.shape[0] - 1, x.stride(1),
           x.stride(2), length, D=d, ROWS=rows, WIDTH=width, LSE=lse is not None)  # fmt: skip


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
    p = _problem(q, k, v, mask, seed, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                 max_seqlen_k, causal, window_left, window_right, softcap, scale, dropout)  # fmt: skip
    h, s, hk, t = *q.shape[1:3], *k.shape[1:3]
    config = p.configuration("forward")
    out, lse = _like(q, v.shape[3]), empty(q.shape[:3], q, torch.float32)
    tiles = cdiv(p.longest_q, config.m)
    _clear(out, lse, cu_seqlens_q)
    launch(
        _attention_forward.forward, (tiles * p.batches * h,),
        p.q, p.k, p.v, mask, seed, sinks, alibi_slopes, documents_q, documents_k,
        p.ranges(config.m, config.n, False), cu_seqlens_q, cu_seqlens_k, out, lse,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *p.mask_strides, *out.stride()[:3], p.slope_batch,
        p.batches, h, h // hk, s, t, tiles, p.span(p.longest_k, h), p.left, p.right, p.factor, p.softcap, p.threshold,
        p.keep_factor, SINKS=sinks is not None, **p.options, **p.bounds(config),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


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
    p = _problem(q, k, v, mask, seed, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                 max_seqlen_k, causal, window_left, window_right, softcap, scale, dropout)  # fmt: skip
    dout, out, lse = _dense(dout), _dense(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    (b, h, s, d), (hk, t, dv) = q.shape, v.shape[1:]
    dq, dk, dvalue = _like(q, d), _like(k, d), _like(v, dv)
    shift, delta = empty((b, h, s), q, torch.float32), empty((b, h, s), q, torch.float32)
    rows = 32
    parts = empty((b, h, cdiv(s, rows)) if sinks is not None else (0,), q, torch.float32)
    launch(
        _attention_backward.prepare, (cdiv(s, rows) * b * h,), dout, out, lse, dlse, sinks, shift, delta, parts,
        *dout.stride()[:3], *out.stride()[:3], h, s, cdiv(s, rows), DV=dv, M=rows, WIDTH_V=next_power_of_2(dv),
        DLSE=dlse is not None, SINKS=sinks is not None, PRECISE=q.dtype is torch.float32,
    )  # fmt: skip
    dsinks = parts.sum((0, 2)) if sinks is not None else parts
    inputs = (p.q, p.k, p.v, mask, seed, alibi_slopes, documents_q, documents_k)
    input_strides = (*p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *p.mask_strides, *dout.stride()[:3])
    numbers = (p.left, p.right, p.factor, p.softcap, p.threshold, p.keep_factor)

    _clear(dk, None, cu_seqlens_k)
    _clear(dvalue, None, cu_seqlens_k)
    config = p.configuration("keys")
    tiles = cdiv(p.longest_k, config.n)
    launch(
        _attention_backward.backward_keys, (tiles * p.batches * hk,),
        *inputs, p.ranges(config.n, config.m, True), cu_seqlens_q, cu_seqlens_k, dout, shift, delta, dk, dvalue,
        *input_strides, *dk.stride()[:3], *dvalue.stride()[:3], p.slope_batch, p.batches, hk, h // hk, s, t, tiles,
        p.span(p.longest_q * (h // hk), hk), *numbers, scale, **p.options, **p.bounds(config),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

    _clear(dq, None, cu_seqlens_q)
    config = p.configuration("queries")
    tiles = cdiv(p.longest_q, config.m)
    launch(
        _attention_backward.backward_queries, (tiles * p.batches * h,),
        *inputs, p.ranges(config.m, config.n, False), cu_seqlens_q, cu_seqlens_k, dout, shift, delta, dq,
        *input_strides, *dq.stride()[:3], p.slope_batch, p.batches, h, h // hk, s, t, tiles, p.span(p.longest_k, h),
        *numbers, scale, **p.options, **p.bounds(config), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    dbias = _bias(p, dout, shift, delta) if needs_bias else empty((0,), q, torch.float32)
    return dq, dk, dvalue, dbias, dsinks


def _bias(p: _Problem, dout: Tensor, shift: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the logits summed to the shape of the mask.

    Where the mask has queries and keys, each program sums its tile over the batch and the heads that the mask has not;
    else sums over keys (or queries) go to float32 scratch of B * H * S (or T), which is then summed.
    """
    assert p.mask is not None
    (b, h, s, _), (hk, t) = p.q.shape, p.k.shape[1:3]
    (mb, mh, ms, mt), config = p.mask.shape, p.configuration("bias")
    keys = mt == t and (t != 1 or ms == s)
    rows = ms == s or not keys
    both = rows and keys
    kept_heads, tiles_m, tiles_n = mh if both else h, cdiv(s, config.m), cdiv(t, config.n)
    outer = mb * mh if both else b * h
    dbias = empty(p.mask.shape if both else (b, h, t if keys else s), p.q, torch.float32)
    options = {name: value for name, value in p.options.items() if name not in ("VARLEN", "FOLD")}
    launch(
        _attention_backward.backward_bias, (outer * (tiles_m if rows else 1) * (tiles_n if keys else 1),),
        p.q, p.k, p.v, p.mask, p.seed, p.slopes, p.documents_q, p.documents_k, dout, shift, delta, dbias,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *p.mask_strides, *dout.stride()[:3], p.slope_batch,
        h, h // hk, s, t, tiles_m, tiles_n, kept_heads, b // mb if both else 1, h // mh if both else 1, p.left, p.right,
        p.factor, p.softcap, p.threshold, p.keep_factor, **options, M=config.m, N=config.n, ROWS=rows, KEYS=keys,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if both:
        return dbias
    return dbias.view(b, h, 1 if keys else s, t if keys else 1).sum_to_size(p.mask.shape).contiguous()
