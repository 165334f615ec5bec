"""What the tests of attention share: cases, the formula written out, PyTorch's own, and the comparison of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.attention import OP
from fastlm.reference.attention import kept
from tests.ops import harness
from tests.ops.harness import BACKWARD, DTYPES, EMULATED, FORWARD, assert_accurate, differentiate, on, refuses

INF, SEED = float("inf"), 5

BACKENDS = ["cuda-forward-80", "cuda-reversed-89", "cuda-shuffled-90"] if EMULATED else harness.BACKENDS
"""Chips whose shared memory or instructions give a call other kernels; with an order of threads each."""
each_backend = pytest.mark.parametrize("backend", BACKENDS)
PAIRS = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES]
if EMULATED:  # each chip's kernels in a dtype, and what is refused once: the emulation takes its time
    PAIRS = [*zip(BACKENDS, (torch.bfloat16, torch.float16, torch.bfloat16), strict=True), (BACKENDS[0], torch.float32)]
each_pair = pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=[f"{b}-{str(d)[6:]}" for b, d in PAIRS])
"""Backends with dtypes."""


def finest(backend: str) -> torch.dtype:
    """The most exact dtype it takes."""
    return torch.float16 if refuses(OP, backend, torch.ones(1)) else torch.float32


def taken(*features: str) -> pytest.MarkDecorator:
    """The backends that declare the features, with each dtype they take."""
    pairs = [(b, d) for b, d in PAIRS if not refuses(OP, b, torch.ones(1, dtype=d), features)]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=[f"{b}-{str(d)[6:]}" for b, d in pairs])


def near(dtype: torch.dtype) -> dict[str, float]:
    """For what differs by the order of sums, or by where weights are rounded."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 11 * eps if dtype is torch.float32 else 2 * eps, "atol": max(1e-5, eps / 2)}


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
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: str = ""
    """Its dimensions, "H" or "BH"."""
    sinks: str = ""
    """"q": in the dtype of q, "float32"."""
    documents: str = ""
    """"sorted", "random" or "pair": with ids of their own for the keys."""
    dropout: float | None = None

    def __str__(self) -> str:
        options = (f"{k}={v}" for k, v in zip(self._fields[10:], self[10:], strict=True) if v not in ("", None))
        return "-".join([*(str(x) for x in self[:10] if x not in ("", None)), *options])


class Problem(NamedTuple):
    """A call: what is differentiable, and the rest."""

    inputs: list[Tensor | None]
    """q, k, v, mask, sinks."""
    options: dict[str, Any]

    def run(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """(out, lse) and gradients, with every floating input in the dtype."""
        inputs = [x if x is None or x.dtype is torch.bool else x.to(dtype or x.dtype) for x in self.inputs]
        return differentiate(lambda q, k, v, m, s: function(q, k, v, mask=m, sinks=s, **self.options), inputs)

    def names(self) -> list[str]:
        names = zip(("dq", "dk", "dv", "dmask", "dsinks"), self.inputs, strict=True)
        return [name for name, x in names if x is not None and x.is_floating_point()]

    def features(self) -> set[str]:
        q, k = self.inputs[:2]
        assert q is not None and k is not None
        found = {name for name in ("softcap", "alibi_slopes", "documents") if self.options.get(name) is not None}
        if self.inputs[4] is not None:
            found.add("sinks")
        left = (self.options.get("window") or (None, None))[0]
        longest = (k if self.options.get("causal") == "bottom-right" else q).shape[2]
        if left is not None and 0 <= left < longest - 1:
            found.add("window")
        return found


def visible(s: int, t: int, causal: Any = False, window: Any = None, documents: Any = None) -> tuple[Tensor, Tensor]:
    """(S, T) or (B, 1, S, T), which keys a query sees; (S, T), how far they stand apart."""
    i, j = torch.arange(s).unsqueeze(1), torch.arange(t)
    if causal == "bottom-right":
        i = i + t - s
    seen = torch.ones(s, t, dtype=torch.bool)
    if causal:
        seen &= j <= i
    left, right = window or (None, None)
    if left not in (None, -1):
        seen &= j >= i - left
    if right not in (None, -1):
        seen &= j <= i + right
    if documents is not None:
        first, second = (documents, documents) if isinstance(documents, Tensor) else documents
        seen = seen & (first[:, None, :, None] == second[:, None, None, :])
    return seen, (i - j).abs()


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: Any = False,
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Any = None,
    scale: float | None = None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Written out, S x T and all, independently of fastlm.reference but for `keep`, the hash of dropout."""
    (b, h, s, d), t = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    x = q @ k.mT * (1 / math.sqrt(d) if scale is None else scale)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    seen, distance = visible(s, t, causal, window, documents)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(x.dtype)
        x = x - (slopes if slopes.dim() == 2 else slopes.unsqueeze(0))[:, :, None, None] * distance
    if mask is not None:
        x = x.masked_fill(~mask, -INF) if mask.dtype is torch.bool else x + mask
    x = x.masked_fill(~seen, -INF)
    if sinks is not None:
        x = torch.cat([x, sinks.to(x.dtype)[None, :, None, None].expand(b, h, s, 1)], -1)
    lse = x.logsumexp(-1)
    blind = (x == -INF).all(-1, keepdim=True)
    p = x.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)[..., :t]
    if dropout:
        keep = kept(dropout_seed(), dropout, b, h, s, t) if keep is None else keep
        p = (p * keep / (1 - dropout)).to(v.dtype)
    return p @ v, lse


def dropout_seed() -> Tensor:
    """What ops.attention draws next after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    return torch.randint(2**63 - 1, (1,))


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: Any = False, scale: float | None = None
) -> Tensor:
    """PyTorch's own, in the dtype of q."""
    groups = q.shape[1] // k.shape[1]
    if causal:
        below, _ = visible(q.shape[2], k.shape[2], causal)
        mask = below if mask is None else mask & below if mask.dtype is torch.bool else mask.masked_fill(~below, -INF)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(q.dtype)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def make_mask(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    kind, _, dims = case.mask.partition(" ")
    sizes = {"B": case.B, "H": case.H, "S": case.S, "T": case.T, "1": 1}
    shape = [sizes[d] for d in dims.strip("()").split(",")]
    return torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)


def make_documents(case: Case) -> Any:
    """Some ids differ in their upper 32 bits alone, some are negative; "pair" has queries whose document has no key."""
    ids = torch.tensor([3, -3, 3 + 2**32, 0])
    if case.documents == "pair":
        return ids[torch.randint(4, (case.B, case.S))], ids[torch.randint(3, (case.B, case.T))]
    numbers = torch.randint(4, (case.B, case.S))
    if case.documents == "sorted":
        return numbers.sort(-1).values.int()
    return ids[numbers]


def make(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q = torch.randn(case.B, case.H, case.S, case.D)
    k = torch.randn(case.B, case.Hk, case.T, case.D)
    v = torch.randn(case.B, case.Hk, case.T, case.Dv)
    return [x.to(dtype) for x in (q, k, v)]


def make_problem(case: Case, dtype: torch.dtype = torch.float32) -> Problem:
    tensors, sinks = make(case, dtype), None
    options: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    options |= {name: value for name in ("window", "softcap", "dropout") if (value := getattr(case, name)) is not None}
    if case.alibi:
        slopes = torch.rand((case.B, case.H) if case.alibi == "BH" else (case.H,))
        options["alibi_slopes"] = slopes / 4
    if case.documents:
        options["documents"] = make_documents(case)
    if case.sinks:
        sinks = torch.randn(case.H).to(dtype if case.sinks == "q" else torch.float32)
    return Problem([*tensors, make_mask(case), sinks], options)


class Expected(NamedTuple):
    """Float64 and eager PyTorch, made once for all backends."""

    oracle: list[Tensor]
    oracle_grads: list[Tensor]
    out: Tensor
    lse: Tensor
    grads: list[Tensor]

    def assert_matched(self, out: Tensor, lse: Tensor, names: Sequence[str], grads: Sequence[Tensor]) -> None:
        independent = lse.numel() >= 128
        # Sums over rows of what the rounding of `out` spoils: as good as the dtype of q, whatever their own.
        grads = [g.to(out.dtype) if name == "dsinks" else g for name, g in zip(names, grads, strict=True)]
        assert_accurate("out", out, self.oracle[0], self.out, FORWARD, independent=independent)
        assert_accurate("lse", lse, self.oracle[1], self.lse, FORWARD, independent=independent)
        for name, grad, oracle, eager in zip(names, grads, self.oracle_grads, self.grads, strict=True):
            # The gradient of a sink is float32, but of rows of `out` that were rounded to its dtype.
            ulps = torch.finfo(out.dtype).eps / torch.finfo(torch.float32).eps if name == "dsinks" else 0
            assert_accurate(name, grad, oracle, eager, BACKWARD, ulps=4 + ulps, independent=independent)


def expect(problem: Problem) -> Expected:
    q, k, v, mask, sinks = problem.inputs
    assert q is not None
    oracle, oracle_grads = problem.run(formula, torch.float64)
    (out, _), grads = problem.run(formula, q.dtype)
    if problem.options.keys() <= {"causal", "scale"} and sinks is None:  # closer than the formula in bfloat16
        with torch.no_grad():
            out = eager(q, k, v, mask, **problem.options)
    (_, lse), _ = problem.run(formula, torch.float32)
    return Expected(oracle, oracle_grads, out, lse, grads)


@cache
def _problem(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    return make_problem(case, dtype)


@cache
def _expected(case: Case, dtype: torch.dtype, device: torch.device) -> Expected:
    return expect(_problem(case, dtype, device))


def compare(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Where the backend declares reasons against the call, it must raise; else be as accurate as the rule says."""
    of = (case, dtype, torch.get_default_device())
    _compare(backend, _problem(*of), lambda: _expected(*of))


def _compare(backend: str, problem: Problem, expected: Callable[[], Expected]) -> None:
    q, _, v, *_ = problem.inputs
    assert q is not None and v is not None

    def run(*tensors: Any, **options: Any) -> Any:
        torch.manual_seed(SEED)
        return ops.attention(*tensors, return_lse=True, **options)

    with on(backend):
        if refuses(OP, backend, q, problem.features(), head_dim=max(q.shape[3], v.shape[3])):
            with pytest.raises(fastlm.UnsupportedError, match=r"it has no|dtype is float32"):
                problem.run(run)
            return
        (out, lse), grads = problem.run(run)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    expected().assert_matched(out, lse, problem.names(), grads)


def check(
    backend: str, tensors: Sequence[Tensor], mask: Tensor | None = None, sinks: Tensor | None = None, **options: Any
) -> None:
    """compare() for one call; options are those of ops.attention."""
    problem = Problem([*tensors, mask, sinks], options)
    _compare(backend, problem, lambda: expect(problem))
