"""attention: softmax(scale * Q K^T + mask) V without the S x T matrix."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import cast, define, distinct, no_double_backward
from fastlm.ops._random import check_dropout, draw_seed

_FEATURES = frozenset({"window", "softcap", "alibi_slopes", "sinks", "documents", "cu_seqlens"})
OP = Op(
    "attention",
    Backend("cpu", "fastlm.native.attention", frozenset({"cpu"}), LOW_PRECISION, limits={"head_dim": 256},
            features=_FEATURES, missing=native.missing),
    Backend("triton", "fastlm.kernels.attention", _platform.DEVICES, LOW_PRECISION, limits={"head_dim": 256},
            features=_FEATURES, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.attention", cuda.DEVICES, frozenset({torch.bfloat16, torch.float16}),
            limits={"head_dim": 256}, features=_FEATURES, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.attention"),
)  # fmt: skip

Causal = bool | Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None]
_CAUSAL: dict[bool | str, int] = {False: 0, True: 1, "top-left": 1, "bottom-right": 2}


def _like(x: Tensor, size: int) -> Tensor:
    """As the backends allocate: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, s, h, size)).transpose(1, 2)
    return x.new_empty((b, h, s, size))


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=_statistics(q))


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sinks: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_bias, statistics = others[-1], _statistics(q)
    dbias = q.new_empty(mask.shape if needs_bias and mask is not None else (0,), dtype=statistics)
    dsinks = q.new_empty((0,) if sinks is None else sinks.shape, dtype=statistics)
    return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), dbias, dsinks


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, Tensor? sinks, Tensor? alibi_slopes,"
    " Tensor? documents_q, Tensor? documents_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int causal, int window_left, int window_right,"
    " float softcap, float scale, float dropout"
)
_forward = define(OP, "forward", f"({_TENSORS}, {_OPTIONS}, str backend) -> (Tensor, Tensor)", _fake_forward)
_backward = define(
    OP,
    "backward",
    f"(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, {_OPTIONS}, bool needs_bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    """Saves every tensor it was given, out and lse (B, H, S)."""

    @staticmethod
    def forward(
        ctx: Any,
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
        backend: str,
    ) -> Any:
        tensors = (q, k, v, mask, seed, sinks, alibi_slopes, documents_q, documents_k, cu_seqlens_q, cu_seqlens_k)
        options = (max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, scale, dropout)
        out, lse = _forward(*tensors, *options, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = options
        ctx.backend = backend
        return out, lse

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        nothing = (None,) * 20
        if dout is None and dlse is None:
            return nothing
        saved = ctx.saved_tensors  # as _TENSORS, then out and lse
        mask, sinks, out = saved[3], saved[5], saved[-2]
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        needs_bias = mask is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dbias, dsinks = _backward(dout, dlse, *saved, *ctx.options, needs_bias, ctx.backend)
        dmask = dbias.to(mask.dtype) if needs_bias else None
        return dq, dk, dv, dmask, None, None if sinks is None else dsinks.to(sinks.dtype), *nothing[6:]


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *layout: str) -> None:
    """(B, H, S, D) or (total, H, D): heads are the second dimension, head dim is the last."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        if tensor.dim() != len(layout):
            raise ValueError(f"{name} must be ({', '.join(layout)}), got shape {tuple(tensor.shape)}")
        check_device(name, tensor, q, "q")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    h, hk, d = q.shape[1], k.shape[1], q.shape[-1]
    if k.shape[-1] != d or (len(layout) == 4 and k.shape[0] != q.shape[0]):
        front = (str(q.shape[0]), *layout[1:-1]) if len(layout) == 4 else layout[:-1]
        raise ValueError(f"k must be ({', '.join(front)}, {d}) to go with q, got {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        front = tuple(map(str, k.shape[:-1]))
        raise ValueError(f"v must be ({', '.join(front)}, {layout[-1]}) to go with k, got {tuple(v.shape)}")
    if hk == 0 or h % hk != 0:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {h} and {hk}")
    if d == 0 or v.shape[-1] == 0:
        raise ValueError(f"{'q' if d == 0 else 'v'} must have a head dim of at least 1, got 0")


def _check_mask(mask: Tensor, q: Tensor, t: int) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor or None, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool (True: attend) or floating point (added), got {mask.dtype}")
    check_device("mask", mask, q, "q")
    full = (*q.shape[:3], t)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(m not in (1, n) for m, n in zip(shape, full, strict=True)):
        raise ValueError(f"mask must be broadcastable to {full}, got {tuple(mask.shape)}")


def _check_documents(documents: Any, q: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The ids of queries and of keys."""
    b, s = q.shape[0], q.shape[2]
    if isinstance(documents, Tensor):
        if s != t:
            raise ValueError(f"documents must be a pair, (B, S) and (B, T), where S is not T, got one for {s} and {t}")
        documents = (documents, documents)
    if not isinstance(documents, (tuple, list)) or len(documents) != 2:
        raise TypeError(f"documents must be a Tensor, a pair of them or None, got {type(documents).__name__}")
    for ids, length in zip(documents, (s, t), strict=True):
        check_integer("documents", ids, q, torch.int32, torch.int64)
        if ids.shape != (b, length):
            raise ValueError(f"documents must be {(b, length)}, got {tuple(ids.shape)}")
    first, second = documents
    if first.dtype != second.dtype:
        raise ValueError(f"documents must be of one dtype, got {first.dtype} and {second.dtype}")
    return first.contiguous(), second.contiguous()


def check_integer(name: str, tensor: Tensor, q: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    check_device(name, tensor, q, "q")


def _window(window: Window | None, causal: int, s: int, t: int) -> tuple[int, int, int]:
    """(causal, left, right), -1 where there is no limit, and no limit that another implies: fewer kernels to choose."""
    if window is None:
        return causal, -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) or None, got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) or side < -1):
            raise ValueError(f"window must hold integers >= 0, and None or -1 for no limit, got {window!r}")
    left, right = (-1 if side is None else side for side in window)
    if left >= (t if causal == 2 else s) - 1:  # reaches the first key from the last query
        left = -1
    if causal or right == 0:
        return causal or 1, left, -1
    return causal, left, -1 if right >= t - 1 else right


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: tuple[Tensor | None, Tensor | None],
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    max_seqlens: tuple[int, int],
    causal: Causal,
    window: Window | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    dropout: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What attention() and attention_varlen() share: options, the choice of a backend, the call. q is (B, H, S, D)."""
    if not isinstance(causal, (bool, str)) or causal not in _CAUSAL:
        raise ValueError(f"causal must be False, True, 'top-left' or 'bottom-right', got {causal!r}")
    code, left, right = _window(window, _CAUSAL[causal], *max_seqlens)
    b, h, _, d = q.shape
    features = []
    if left >= 0:  # one without a left side is a diagonal, as causal is: no feature
        features.append("window")
    if softcap is not None:
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be a positive number or None, got {softcap}")
        features.append("softcap")
    if alibi_slopes is not None:
        check_floating("alibi_slopes", alibi_slopes)
        check_device("alibi_slopes", alibi_slopes, q, "q")
        if alibi_slopes.shape not in ((h,), (b, h)):
            raise ValueError(f"alibi_slopes must be {(h,)} or {(b, h)}, got {tuple(alibi_slopes.shape)}")
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes must not require a gradient: there is none; detach() them")
        alibi_slopes = cast(alibi_slopes, torch.float32).contiguous()
        features.append("alibi_slopes")
    if sinks is not None:
        check_floating("sinks", sinks)
        check_device("sinks", sinks, q, "q")
        if sinks.shape != (h,):
            raise ValueError(f"sinks must be {(h,)}, one per head of q, got {tuple(sinks.shape)}")
        sinks = sinks.contiguous()
        features.append("sinks")
    if documents[0] is not None:
        features.append("documents")
    if cu_seqlens[0] is not None:
        features.append("cu_seqlens")
    check_dropout(dropout)  # before the choice of a backend, which may warn
    name = OP.select(q, backend, frozenset(features), head_dim=max(d, v.shape[3]))
    seed = draw_seed(dropout, q.device)
    factor = 1.0 / math.sqrt(d) if scale is None else float(scale)
    tensors = distinct(q, k, v, mask, seed, sinks, alibi_slopes, *documents, *cu_seqlens)
    arguments = (*tensors, *max_seqlens, code, left, right, float(softcap or 0.0), factor, float(dropout), name)
    return _Attention.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    documents: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with the online softmax and recomputation (Dao et al. 2022, arXiv:2205.14135).

    out = dropout(softmax(scale * q k^T + mask)) v. Memory O(S): logits exist a tile at a time. Products and sums in
    float32 (float64 for float64). With the options below, in this order,

        x = scale * q k^T;  x = softcap * tanh(x / softcap);  x += mask;  x -= alibi_slopes * |i + offset - j|

    for query i and key j; what mask, causal, window or documents hide is left out; sinks join the denominator. The
    offset is T - S where causal is "bottom-right" (the last query stands at the last key), else 0.

    Args:
        q: (B, H, S, D), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        k: (B, Hk, T, D), v: (B, Hk, T, Dv), dtype of q; H must be a multiple of Hk, query head h reads key head
            h // (H // Hk) (grouped and multi-query attention, nothing is repeated). D and Dv up to 256; any on
            "reference".
        mask: broadcastable to (B, H, S, T); bool, True where attended, or floating point, added to the logits (-inf
            removes a key) and differentiable. Read through its strides: a broadcast mask is never expanded.
        causal: True or "top-left": query i sees keys j <= i; "bottom-right": j <= i + T - S. Combines with mask.
        window: (left, right): query i sees keys i + offset - left <= j <= i + offset + right (sliding window, Beltagy
            et al. 2020, arXiv:2004.05150). None or -1 on a side: no limit. Combines with causal and mask.
        softcap: positive bound of the logits (Gemma 2, arXiv:2408.00118), in their unit.
        alibi_slopes: (H,) or (B, H), floating point, read as float32: ALiBi (Press et al. 2022, arXiv:2108.12409). Gets
            no gradient.
        sinks: (H,), floating point: one more logit per head in the denominator that has no value and nothing hides
            (Xiao et al. 2024, arXiv:2309.17453; gpt-oss). Differentiable.
        documents: (B, S) where T is S, or a pair of (B, S) for queries and (B, T) for keys; int32 or int64, in any
            order: a query sees the keys of its own number alone.
        scale: factor of the logits; None is 1 / sqrt(D).
        dropout: probability in [0, 1) that a weight is dropped; the kept ones are divided by 1 - dropout. Drawn from
            torch's default generator, and the same on every backend.
        return_lse: also return log(sum(exp(logits))), sinks included.
        backend: "cpu", "triton", "cuda" (bfloat16 and float16) or "reference"; None chooses.

    Returns:
        (B, H, S, Dv), dtype of q, in memory as q is: (B, S, H, Dv) contiguous where q is a transposed (B, S, H, D).
        With return_lse also (B, H, S), float32 (float64 for float64), differentiable. A query that sees no key gives
        0 and -inf (the sink, where there is one), and no gradient but the sink's. NaN or Inf in keys and values a query
        does not see does not reach it.

    Raises:
        ValueError: shapes, devices or options do not agree; alibi_slopes require a gradient.
        TypeError: a tensor is not of a dtype allowed for it.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: the tensors given, out, lse, and one number as seed of dropout. No double backward.
    """
    check_tensors(q, k, v, "batch", "heads", "length", "head dim")
    s, t = q.shape[2], k.shape[2]
    if mask is not None:
        _check_mask(mask, q, t)
        if mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
    ids = (None, None) if documents is None else _check_documents(documents, q, t)
    out, lse = attend(q, k, v, mask, ids, (None, None), (s, t), causal, window, softcap, alibi_slopes, sinks, scale,
                      dropout, backend)  # fmt: skip
    return (out, lse) if return_lse else out
