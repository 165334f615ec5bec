"""forward() and backward() of attention over the CUDA launchers.

The kernels read 16 bytes at a time: a tensor whose rows cannot be read so is copied, and head dims are filled up to
multiples of 8. Which kernels and tiles a call takes is decided in csrc/cuda/attention.cpp; plan() asks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.cuda import DTYPES, address, empty, extension, lane, nothing, output

F32 = torch.float32
EVERY_KEY = 1 << 40
"""A distance no sequence reaches."""

ORDERED = True
"""Blocks of the backward add to dq in turn, so that it has the same bits every time. False: for whoever measures what
that costs."""
HOPPER = True
"""False: for whoever measures the kernels of sm_80 on a GPU that has others."""


class Plan(NamedTuple):
    """What attention.cpp makes of a call."""

    path: str
    """"ampere" or "hopper"."""
    m: int
    """Queries of a tile."""
    n: int
    """Keys of a tile."""
    ranges: int
    """How many numbers it needs room for, here and below."""
    dq_sum: int
    turns: int
    dsinks: int


def _whole(size: int) -> int:
    return size + -size % 8


def _like(x: Tensor, size: int) -> Tensor:
    """An empty (*x.shape[:-1], size) with x's order of heads and positions: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return empty((b, s, h, size), x).transpose(1, 2)
    return empty((b, h, s, size), x)


class _Rows(NamedTuple):
    """A (B, H, S, D) tensor as the kernels take it: to be kept while its memory is read."""

    tensor: Tensor
    at: tuple[int, tuple[int, ...]]
    """Address and strides."""


def _rows(name: str, x: Tensor, dtype: torch.dtype) -> _Rows:
    if x.shape[3] % 8:
        x = F.pad(x, (0, -x.shape[3] % 8))
    at = address(name, x, dtype, contiguous=False)
    apart = (stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1)
    if at % 16 or x.stride(3) != 1 or any(stride % 8 for stride in apart):
        x = x.clone(memory_format=torch.contiguous_format)
        at = address(name, x, dtype)
    return _Rows(x, (at, x.stride()))


class _Output:
    """An output of a head dim that may be no multiple of 8; the kernels write what is."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.result = _like(like, size)
        self._written = self.result if size % 8 == 0 else _like(like, _whole(size))
        self.at = output(self._written), self._written.stride()

    def finished(self) -> Tensor:
        if self._written is not self.result:
            self.result.copy_(self._written[..., : self.result.shape[3]])
        return self.result


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int, int, tuple[int, ...]]:
    """The mask (to keep it alive), its address, type code and strides over (B, H, S, T)."""
    if mask is None:
        return None, 0, -1, (0, 0, 0, 0)
    if mask.dtype is torch.float64:
        mask = mask.to(F32)
    code = 3 if mask.dtype is torch.bool else DTYPES[mask.dtype]
    return mask, address("mask", mask, mask.dtype, contiguous=False), code, mask.expand(shape).stride()


class _Problem:
    """A call as the launchers take it (AttentionCall in csrc/fastlm.h); keeps the tensors alive that they read."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, sinks: Tensor | None,
        alibi_slopes: Tensor | None, documents_q: Tensor | None, documents_k: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: int,
        window_left: int, window_right: int, softcap: float, scale: float, dropout: float,
    ) -> None:  # fmt: skip
        dtype, (b, h, s, d), (hk, t, dv) = q.dtype, q.shape, v.shape[1:]
        self.q, self.k, self.v = _rows("q", q, dtype), _rows("k", k, dtype), _rows("v", v, dtype)
        self.mask, *mask_at = _mask(mask, (b, h, s, t))
        options = None
        if not (sinks is alibi_slopes is documents_q is cu_seqlens_q is None and window_left < 0 and softcap == 0):
            self.sinks = None if sinks is None else sinks.to(F32).contiguous()
            self.documents = [None if ids is None else ids.to(torch.int64) for ids in (documents_q, documents_k)]
            cu = (cu_seqlens_q, cu_seqlens_k)
            options = (
                window_left if window_left >= 0 else EVERY_KEY, softcap, address("alibi_slopes", alibi_slopes, F32),
                0 if alibi_slopes is None or alibi_slopes.dim() == 1 else h, address("sinks", self.sinks, F32), 0,
                *(address("documents", ids, torch.int64) for ids in self.documents), True,
                *(address("cu_seqlens", lengths, torch.int32) for lengths in cu),
                0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k,
            )  # fmt: skip
        self.documented = documents_q is not None
        self.call = (
            DTYPES[dtype], *self.q.at, *self.k.at, *self.v.at, *mask_at, address("seed", seed, torch.int64),
            (b, h, hk, s, t, _whole(d), _whole(dv)), causal == 2,
            0 if causal else EVERY_KEY if window_right < 0 else window_right, options, scale, dropout, HOPPER,
        )  # fmt: skip

    def plan(self, backward: bool, strides: tuple[int, ...]) -> Plan:
        """For out, or in the backward for dout, with these strides."""
        return Plan(*extension().attention_plan(self.call, backward, strides, lane(self.q.tensor)[0]))


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
    out, lse = _Output(q, v.shape[3]), empty(q.shape[:3], q, F32)
    if lse.numel() == 0:
        return out.result, lse
    p = _Problem(q, k, v, mask, seed, sinks, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k,
                 max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, scale, dropout)  # fmt: skip
    ranges = nothing(q, torch.int32)
    if p.documented:
        ranges = empty((p.plan(False, out.at[1]).ranges,), q, torch.int32)
    extension().attention_forward(p.call, *out.at, output(lse), output(ranges), *lane(lse))
    return out.finished(), lse


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
    (b, h, s, d), dtype = q.shape, q.dtype
    dq, dk, dvalue = _Output(q, d), _Output(k, d), _Output(v, v.shape[3])
    if lse.numel() == 0:
        dbias = empty(mask.shape, q, F32).zero_() if needs_bias and mask is not None else nothing(q, F32)
        dsinks = nothing(q, F32) if sinks is None else empty((h,), q, F32).zero_()
        return dq.result, dk.result.zero_(), dvalue.result.zero_(), dbias, dsinks
    p = _Problem(q, k, v, mask, seed, sinks, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k,
                 max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, scale, dropout)  # fmt: skip
    grad, y, lse = _rows("dout", dout, dtype), _rows("out", out, dtype), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    plan, where = p.plan(True, grad.at[1]), lane(lse)
    dq_sum, turns = empty((plan.dq_sum,), q, F32), empty((plan.turns,), q, torch.int32)
    ranges, parts = empty((plan.ranges,), q, torch.int32), empty((plan.dsinks,), q, F32)
    shift, delta = empty((b, h, s), q, F32), empty((b, h, s), q, F32)
    extension().attention_backward(
        p.call, *y.at, *grad.at, address("lse", lse, F32), address("dlse", dlse, F32), *dq.at, *dk.at, *dvalue.at,
        output(parts), output(shift), output(delta), output(dq_sum), output(turns), output(ranges), ORDERED, *where,
    )  # fmt: skip
    dsinks = nothing(q, F32) if sinks is None else parts.view(b, h, -1).sum((0, 2))
    dbias = _bias(p, mask, grad, shift, delta) if needs_bias and mask is not None else nothing(q, F32)
    return dq.finished(), dk.finished(), dvalue.finished(), dbias, dsinks


def _bias(p: _Problem, mask: Tensor, grad: _Rows, shift: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the logits summed to the shape of the mask.

    Where the mask has queries and keys, the kernel sums over the batch and the heads that the mask has not; else it
    leaves sums over keys (or queries), which are added up here.
    """
    (b, h, s), t, (_, _, ms, mt) = shift.shape, p.k.tensor.shape[2], mask.shape
    keys = mt == t and (t != 1 or ms == s)
    both = keys and ms == s
    dbias = empty(mask.shape if both else (b, h, t if keys else s), shift)
    extension().attention_bias(
        p.call, *grad.at, output(shift), output(delta), output(dbias), tuple(mask.shape), *lane(dbias)
    )
    if both:
        return dbias
    return dbias.view(b, h, 1 if keys else s, t if keys else 1).sum_to_size(mask.shape).contiguous()
