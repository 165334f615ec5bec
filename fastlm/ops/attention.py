"""attention: softmax(scale * Q K^T + mask) V without the S x T matrix."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastlm import native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import define, no_double_backward

OP = Op(
    "attention",
    Backend("cpu", "fastlm.native.attention", frozenset({"cpu"}), LOW_PRECISION, limits={"head_dim": 256},
            missing=native.missing),
    Backend("reference", "fastlm.reference.attention"),
)  # fmt: skip

Causal = bool | Literal["top-left", "bottom-right"]
_CAUSAL: dict[bool | str, int] = {False: 0, True: 1, "top-left": 1, "bottom-right": 2}


def _like(x: Tensor, size: int) -> Tensor:
    """As the backends allocate: (B, S, H, .) transposed stays so."""
    b, h, s = x.shape[:3]
    if h > 1 and s > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((b, s, h, size)).transpose(1, 2)
    return x.new_empty((b, h, s, size))


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, causal: int, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=_statistics(q))


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: int,
    scale: float,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = lse.new_empty(mask.shape if needs_bias and mask is not None else (0,))
    return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), dbias


_forward = define(
    OP,
    "forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, int causal, float scale, float dropout, str backend)"
    " -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, Tensor out, Tensor lse,"
    " int causal, float scale, float dropout, bool needs_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, mask, the seed of dropout, out and lse (B, H, S)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        causal: int,
        scale: float,
        dropout: float,
        backend: str,
    ) -> Any:
        out, lse = _forward(q, k, v, mask, seed, causal, scale, dropout, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, seed, out, lse)
        ctx.options = (causal, scale, dropout)
        ctx.backend = backend
        return out, lse

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, mask, seed, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 9
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        needs_bias = mask is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dbias = _backward(dout, dlse, q, k, v, mask, seed, out, lse, *ctx.options, needs_bias, ctx.backend)
        dmask = dbias.to(mask.dtype) if needs_bias else None
        return dq, dk, dv, dmask, None, None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head dim), got shape {tuple(tensor.shape)}")
        check_device(name, tensor, q, "q")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    (b, h, s, d), (hk, t) = q.shape, k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"k must be ({b}, heads, length, {d}) to go with q, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be ({b}, {hk}, {t}, head dim) to go with k, got {tuple(v.shape)}")
    if hk == 0 or h % hk != 0:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {h} and {hk}")
    if d == 0 or v.shape[3] == 0:
        raise ValueError(f"{'q' if d == 0 else 'v'} must have a head dim of at least 1, got 0")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor or None, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool (True: attend) or floating point (added), got {mask.dtype}")
    check_device("mask", mask, q, "q")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(m not in (1, n) for m, n in zip(shape, (b, h, s, t), strict=True)):
        raise ValueError(f"mask must be broadcastable to {(b, h, s, t)}, got {tuple(mask.shape)}")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Causal = False,
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
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with the online softmax and recomputation (Dao et al. 2022, arXiv:2205.14135).

    out = dropout(softmax(scale * q k^T + mask)) v. Memory O(S): logits exist a tile at a time. Products and sums in
    float32 (float64 for float64).

    Args:
        q: (B, H, S, D), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        k: (B, Hk, T, D), v: (B, Hk, T, Dv), dtype of q; H must be a multiple of Hk, query head h reads key head
            h // (H // Hk) (grouped and multi-query attention, nothing is repeated). D and Dv up to 256 on "cpu".
        mask: broadcastable to (B, H, S, T); bool, True where attended, or floating point, added to the logits (-inf
            removes a key) and differentiable. Read through its strides: a broadcast mask is never expanded.
        causal: True or "top-left": query i sees keys j <= i; "bottom-right": j <= i + T - S. Combines with mask.
        scale: factor of the logits; None is 1 / sqrt(D).
        dropout: probability in [0, 1) that a weight is dropped; the kept ones are divided by 1 - dropout. Drawn from
            torch's default generator, and the same on every backend.
        return_lse: also return log(sum(exp(logits))).
        backend: "cpu" or "reference"; None chooses.

    Returns:
        (B, H, S, Dv), dtype of q, in memory as q is: (B, S, H, Dv) contiguous where q is a transposed (B, S, H, D).
        With return_lse also (B, H, S), float32 (float64 for float64), differentiable. A query that sees no key gives
        0 and -inf, and no gradient. NaN or Inf in keys and values a query does not see does not reach it.

    Raises:
        ValueError: shapes, dtypes, devices or options do not agree.
        TypeError: a tensor is not of a floating (mask: or bool) dtype.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: q, k, v, mask, out, lse, and one number as seed of dropout. No double backward.
    """
    _check(q, k, v, mask)
    if not isinstance(causal, (bool, str)) or causal not in _CAUSAL:
        raise ValueError(f"causal must be False, True, 'top-left' or 'bottom-right', got {causal!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    name = OP.select(q, backend, head_dim=max(q.shape[3], v.shape[3]))
    if mask is not None and mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout > 0.0 else None
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    arguments = (q, k, v, mask, seed, _CAUSAL[causal], factor, float(dropout), name)
    out, lse = _Attention.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)
    return (out, lse) if return_lse else out
