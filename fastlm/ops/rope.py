"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import define, distinct, no_double_backward

OP = Op(
    "rope",
    Backend("cpu", "fastlm.native.rope", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.rope", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.rope", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.rope"),
)


def _like(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((b, s, h, d)).transpose(1, 2)
    return x.new_empty((b, h, s, d))


def _fake(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty((0,)) if k is None else _like(k)


_forward = define(
    OP,
    "forward",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, str backend) -> (Tensor, Tensor)",
    _fake,
)
_backward = define(
    OP,
    "backward",
    "(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, bool interleaved, str backend) -> (Tensor, Tensor)",
    _fake,
)


class _Rope(torch.autograd.Function):
    """Saves cos and sin; the backward is the rotation by the opposite angles."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        outs = _forward(q, k, cos, sin, interleaved, backend)
        return outs[0] if k is None else outs

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None = None) -> Any:
        cos, sin = ctx.saved_tensors
        rest = (None, None, None, None)
        if dq is None:  # only the keys were used
            return None, None if dk is None else _backward(dk, None, cos, sin, ctx.interleaved, ctx.backend)[0], *rest
        gq, gk = _backward(dq, dk, cos, sin, ctx.interleaved, ctx.backend)
        return gq, None if dk is None else gk, *rest


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    check_floating("q", q)
    shape, device = q.shape, q.device  # read once: torch makes a new object for each asking
    if len(shape) != 4:
        raise ValueError(f"q must be (B, H, S, D), got {tuple(shape)}")
    B, _, S, D = shape
    if k is not None:
        check_floating("k", k)
        keys = k.shape
        if len(keys) != 4:
            raise ValueError(f"k must be (B, H, S, D), got {tuple(keys)}")
        if k.device != device:
            check_device("k", k, q, "q")
        if k.dtype != q.dtype or keys[0] != B or keys[2] != S or keys[3] != D:
            raise ValueError(f"k must be ({B}, H, {S}, {D}) of {q.dtype} like q, got {tuple(keys)} of {k.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        if table.device != device:
            check_device(name, table, q, "q")
        size = table.shape
        dims = len(size)
        if (dims != 2 and (dims != 3 or size[0] not in (1, B))) or size[-2] != S or 2 * size[-1] > D:
            raise ValueError(
                f"{name} must be ({S}, R/2) or ({B}, {S}, R/2) with R <= {D}, for q {tuple(shape)}, got {tuple(size)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: rope has none for it; pass {name}.detach()")
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")


@overload
def rope(
    q: Tensor, k: None, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> Tensor: ...


@overload
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]: ...


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in one call.

    Each pair (a, b) of channels becomes (a cos - b sin, b cos + a sin). Pairs are (i, i + R/2), as in Llama and
    GPT-NeoX, or (2i, 2i + 1) when interleaved. R = 2 * cos.shape[-1]; channels from R on pass through (partial rotary).

    Args:
        q: (B, H, S, D), float32, bfloat16, float16 or float64; any strides, a copy is made unless the last is 1.
        k: (B, Hk, S, D) of the same dtype, or None.
        cos, sin: (S, R/2) or (B, S, R/2), R <= D: of position times frequency. float32 is read as it is.
        interleaved: which channels make a pair.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        (q', k'), or q' alone when k is None. Each is stored as its input is: a transposed view of a (B, S, H, D) tensor
        gives such a view again, so that a later reshape costs no copy.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or cos or sin require a gradient.
        TypeError: an argument is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: cos and sin. No double backward.
    """
    _check(q, k, cos, sin)
    name = OP.select(q, backend)
    if torch.is_grad_enabled():
        return _Rope.apply(*distinct(q, k, cos, sin), interleaved, name)
    outs = _forward(q, k, cos, sin, interleaved, name)
    return outs[0] if k is None else outs
