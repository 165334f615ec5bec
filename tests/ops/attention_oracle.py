"""What the tests of attention share: cases, the formula written out, PyTorch's own, and the comparison of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from tests.ops.harness import BACKWARD, FORWARD, assert_accurate, assert_all_accurate, differentiate, on

INF = float("inf")
GRADS = ("dq", "dk", "dv", "dmask")


class Case(NamedTuple):
    B: int
    H: int
    Hk: int
    S: int
    T: int
    D: int
    Dv: int
    causal: Any = False
    mask: str = ""
    scale: float | None = None

    def __str__(self) -> str:
        return "-".join(str(x) for x in self if x not in ("", None))


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: Any = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Written out, S x T and all, independently of fastlm.reference."""
    s, t, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    x = q @ k.repeat_interleave(groups, 1).mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if mask is not None:
        x = x.masked_fill(~mask, -INF) if mask.dtype is torch.bool else x + mask
    if causal:
        diagonal = t - s if causal == "bottom-right" else 0
        x = x.masked_fill(~torch.ones(s, t, dtype=torch.bool).tril(diagonal), -INF)
    lse = x.logsumexp(-1)
    blind = (x == -INF).all(-1, keepdim=True)
    p = x.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return p @ v.repeat_interleave(groups, 1), lse


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: Any, scale: float | None) -> Tensor:
    """PyTorch's own, in the dtype of q."""
    h, s, t = *q.shape[1:3], k.shape[2]
    if causal:
        below = torch.ones(s, t, dtype=torch.bool).tril(t - s if causal == "bottom-right" else 0)
        mask = below if mask is None else mask & below if mask.dtype is torch.bool else mask.masked_fill(~below, -INF)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(q.dtype)
    groups = h // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def make_mask(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    kind, _, dims = case.mask.partition(" ")
    sizes = {"B": case.B, "H": case.H, "S": case.S, "T": case.T, "1": 1}
    shape = [sizes[d] for d in dims.strip("()").split(",")]
    return torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)


def make(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q = torch.randn(case.B, case.H, case.S, case.D)
    k = torch.randn(case.B, case.Hk, case.T, case.D)
    v = torch.randn(case.B, case.Hk, case.T, case.Dv)
    return [x.to(dtype) for x in (q, k, v)]


class Expected(NamedTuple):
    """Float64 and eager PyTorch, made once for all backends."""

    oracle: list[Tensor]
    oracle_grads: list[Tensor]
    out: list[Tensor]
    lse: Tensor
    grads: list[Tensor]


def expect(case: Case, tensors: Sequence[Tensor], mask: Tensor | None) -> Expected:
    options = {"causal": case.causal, "scale": case.scale}
    dtype, wide = tensors[0].dtype, [x.double() for x in tensors]
    oracle, oracle_grads = differentiate(lambda *x: formula(*x, **options), [*wide, as_dtype(mask, torch.float64)])
    with torch.no_grad():
        out = eager(*tensors, mask, **options)
        lse = formula(*(x.float() for x in tensors), as_dtype(mask, torch.float32), **options)[1]
    _, grads = differentiate(lambda *x: formula(*x, **options), [*tensors, as_dtype(mask, dtype)])
    return Expected(oracle, oracle_grads, [out], lse, grads)


@cache
def prepared(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Expected]:
    tensors, mask = make(case, dtype), make_mask(case)
    return tensors, mask, expect(case, tensors, mask)


def compare(case: Case, backend: str, tensors: list[Tensor], mask: Tensor | None, expected: Expected) -> None:
    options = {"causal": case.causal, "scale": case.scale, "return_lse": True}
    with on(backend):
        (out, lse), grads = differentiate(lambda *x: ops.attention(*x[:3], mask=x[3], **options), [*tensors, mask])
    dtype = tensors[0].dtype
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_all_accurate(["out"], [out], expected.oracle[:1], expected.out, FORWARD)
    assert_accurate("lse", lse, expected.oracle[1], expected.lse, FORWARD)
    assert_all_accurate(GRADS[: len(grads)], grads, expected.oracle_grads, expected.grads, BACKWARD)


def as_dtype(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
