"""forward() and backward() of attention over the C++ extension.

Of the options that ops.attention calls features the kernel has none; its table says so and keeps them away. A window
without a left side is a diagonal, as causal is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, threads

F32 = torch.float32
NONE = (0, 0, 0, 0)
EVERY_KEY = 1 << 40  # a diagonal no sequence reaches


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


def _diagonal(causal: int, window_right: int, s: int, t: int) -> int:
    """The d of "query i sees key j <= i + d"."""
    if causal == 0:
        return EVERY_KEY if window_right < 0 else window_right
    return 0 if causal == 1 else t - s


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
    out, lse = _like(q, dv), empty((b, h, s), F32)
    mask, mask_address, mask_type, mask_strides = _mask(mask, (b, h, s, t))
    team = threads()
    scratch = empty((team * extension().attention_forward_scratch(d, dv),), F32)
    extension().attention_forward(
        DTYPES[dtype],
        address("q", q, dtype, contiguous=False), q.stride(),
        address("k", k, dtype, contiguous=False), k.stride(),
        address("v", v, dtype, contiguous=False), v.stride(),
        mask_address, mask_type, mask_strides,
        address("seed", seed, torch.int64),
        address("out", out, dtype, contiguous=False), out.stride(),
        address("lse", lse, F32), address("scratch", scratch, F32),
        b, h, hk, s, t, d, dv, _diagonal(causal, window_right, s, t), scale, dropout, team,
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
    dtype, (b, h, s, d), (hk, t, dv) = q.dtype, q.shape, v.shape[1:]
    q, k, v, out, dout = _dense(q), _dense(k), _dense(v), _dense(out), _dense(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dvalue = _like(q, d), _like(k, d), _like(v, dv)
    bias_strides: tuple[int, ...] = NONE
    dbias = empty((0,), F32)
    if needs_bias:
        assert mask is not None
        dbias = empty(mask.shape, F32).zero_()
        bias_strides = dbias.expand(b, h, s, t).stride()
    mask, mask_address, mask_type, mask_strides = _mask(mask, (b, h, s, t))
    team = threads()
    scratch = empty((extension().attention_scratch(b, h, hk, s, t, d, dv, team),), F32)
    extension().attention_backward(
        DTYPES[dtype],
        address("q", q, dtype, contiguous=False), q.stride(),
        address("k", k, dtype, contiguous=False), k.stride(),
        address("v", v, dtype, contiguous=False), v.stride(),
        mask_address, mask_type, mask_strides,
        address("seed", seed, torch.int64),
        address("out", out, dtype, contiguous=False), out.stride(),
        address("dout", dout, dtype, contiguous=False), dout.stride(),
        address("lse", lse, F32), address("dlse", dlse, F32),
        address("dq", dq, dtype, contiguous=False), dq.stride(),
        address("dk", dk, dtype, contiguous=False), dk.stride(),
        address("dv", dvalue, dtype, contiguous=False), dvalue.stride(),
        address("dbias", dbias if needs_bias else None, F32), bias_strides,
        address("scratch", scratch, F32),
        b, h, hk, s, t, d, dv, _diagonal(causal, window_right, s, t), scale, dropout, team,
    )  # fmt: skip
    return dq, dk, dvalue, dbias, empty((0,), F32)
