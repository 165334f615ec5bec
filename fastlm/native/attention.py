"""forward() and backward() of attention over the C++ extension.

A window without a left side is a diagonal, as causal is. Everything that ops.attention calls a feature goes to the
kernel as one tuple, None in most calls: see AttentionOptions in csrc/fastlm.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, nothing, output, threads, vector, workspace

F32 = torch.float32
NONE = (0, 0, 0, 0)
EVERY_KEY = 1 << 40  # a distance no sequence reaches


def _dense(tensor: Tensor) -> Tensor:
    """The kernels take any strides but those of the last dimension."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def _like(x: Tensor, size: int) -> Tensor:
    """An empty (*x.shape[:-1], size) with x's order of heads and positions: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return empty((b, s, h, size), x.dtype).transpose(1, 2)
    return empty((b, h, s, size), x.dtype)


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int, int, tuple[int, ...]]:
    """The mask (to keep it alive), its address, type code and strides over (B, H, S, T)."""
    if mask is None:
        return None, 0, -1, NONE
    if mask.dtype is torch.float64:
        mask = mask.to(F32)
    code = 3 if mask.dtype is torch.bool else DTYPES[mask.dtype]
    return mask, address("mask", mask, mask.dtype, contiguous=False), code, mask.expand(shape).stride()


def _right(causal: int, window_right: int) -> tuple[bool, int]:
    """Whether queries are counted from the last key, and how far behind its own a query sees keys."""
    return causal == 2, 0 if causal else EVERY_KEY if window_right < 0 else window_right


class _Options:
    """The features of a call as the kernel takes them; keeps the tensors alive that it reads."""

    def __init__(self, s: int, t: int, sinks: Tensor | None, alibi_slopes: Tensor | None, documents_q: Tensor | None,
                 documents_k: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
                 window_left: int, softcap: float) -> None:  # fmt: skip
        self.sinks, sinks_address = vector("sinks", sinks)
        alibi_batch = 0 if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes.shape[1]
        self._front = (
            window_left if window_left >= 0 else EVERY_KEY, softcap,
            address("alibi_slopes", alibi_slopes, F32), alibi_batch, sinks_address,
        )  # fmt: skip
        cu = address("cu_seqlens_q", cu_seqlens_q, torch.int32), address("cu_seqlens_k", cu_seqlens_k, torch.int32)
        self.sequences: tuple[int, int, int] | None = None
        """How many are packed, and the longest of queries and keys."""
        if cu_seqlens_q is not None:
            n, longest = cu_seqlens_q.shape[0] - 1, extension().attention_longest
            self.sequences = (n, longest(cu[0], n, s), longest(cu[1], n, t))
        self._back = (
            address("documents_q", documents_q, torch.int32, torch.int64),
            address("documents_k", documents_k, torch.int32, torch.int64),
            documents_q is not None and documents_q.dtype is torch.int64,
            *cu, *(self.sequences or (0, 0, 0)),
        )  # fmt: skip

    def given(self, dsinks: int = 0) -> tuple[Any, ...]:
        return (*self._front, dsinks, *self._back)


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
    dtype, (b, h, s, d), (hk, t, dv) = q.dtype, q.shape, v.shape[1:]
    q, k, v = _dense(q), _dense(k), _dense(v)
    options = None
    if not (sinks is alibi_slopes is documents_q is cu_seqlens_q is None and window_left < 0 and softcap == 0):
        options = _Options(s, t, sinks, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k, window_left,
                           softcap)  # fmt: skip
    out, lse = _like(q, dv), empty((b, h, s), F32)
    mask, mask_address, mask_type, mask_strides = _mask(mask, (b, h, s, t))
    team = threads()
    with workspace(extension().attention_forward_scratch(s, d, dv, team)) as scratch:
        extension().attention_forward(
            DTYPES[dtype],
            address("q", q, dtype, contiguous=False), q.stride(),
            address("k", k, dtype, contiguous=False), k.stride(),
            address("v", v, dtype, contiguous=False), v.stride(),
            mask_address, mask_type, mask_strides, address("seed", seed, torch.int64),
            output(out), out.stride(), output(lse), output(scratch),
            b, h, hk, s, t, d, dv, *_right(causal, window_right), options and options.given(), scale, dropout, team,
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
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, (b, h, s, d), (hk, t, dv) = q.dtype, q.shape, v.shape[1:]
    q, k, v, out, dout = _dense(q), _dense(k), _dense(v), _dense(out), _dense(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dvalue = (_like(q, d), _like(k, d), _like(v, dv)) if into is None else into
    bias_strides: tuple[int, ...] = NONE
    dbias = nothing(F32)
    if needs_bias:
        assert mask is not None
        dbias = empty(mask.shape, F32).zero_()
        bias_strides = dbias.expand(b, h, s, t).stride()
    mask, mask_address, mask_type, mask_strides = _mask(mask, (b, h, s, t))
    team = threads()
    dsinks = empty((0 if sinks is None else h,), F32)
    options, longest = None, (b, s, t)
    if not (sinks is alibi_slopes is documents_q is cu_seqlens_q is None and window_left < 0 and softcap == 0):
        options = _Options(s, t, sinks, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k, window_left,
                           softcap)  # fmt: skip
        longest = options.sequences or longest
    size = extension().attention_scratch(longest[0], h, hk, longest[1], longest[2], d, dv, team)
    with workspace(size) as scratch:
        extension().attention_backward(
            DTYPES[dtype],
            address("q", q, dtype, contiguous=False), q.stride(),
            address("k", k, dtype, contiguous=False), k.stride(),
            address("v", v, dtype, contiguous=False), v.stride(),
            mask_address, mask_type, mask_strides, address("seed", seed, torch.int64),
            address("out", out, dtype, contiguous=False), out.stride(),
            address("dout", dout, dtype, contiguous=False), dout.stride(),
            address("lse", lse, F32), address("dlse", dlse, F32),
            output(dq), dq.stride(), output(dk), dk.stride(), output(dvalue), dvalue.stride(),
            output(dbias) if needs_bias else 0, bias_strides, output(scratch),
            b, h, hk, s, t, d, dv, *_right(causal, window_right),
            options and options.given(0 if sinks is None else output(dsinks)), scale, dropout, team,
        )  # fmt: skip
    return dq, dk, dvalue, dbias, dsinks
