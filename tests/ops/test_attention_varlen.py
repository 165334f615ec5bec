"""attention_varlen: sequences packed one behind the other, against each of them alone."""

from __future__ import annotations

from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.attention import OP
from fastlm.reference.attention import kept
from tests.ops.attention_oracle import (
    BACKENDS,
    INF,
    SEED,
    Expected,
    dropout_seed,
    each_pair,
    finest,
    formula,
    near,
    taken,
    visible,
)
from tests.ops.harness import assert_same_bits, assert_same_values, differentiate, on, refuses

FEATURES = frozenset({"cu_seqlens", "window", "softcap", "sinks"})
ABLE = [b for b in BACKENDS if not refuses(OP, b, torch.ones(1, dtype=finest(b)), FEATURES)]
each_able = pytest.mark.parametrize("backend", ABLE)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    """Lengths of the keys; None: those of the queries."""
    H: int = 2
    Hk: int = 1
    D: int = 32
    Dv: int = 32
    rest: int = 0
    """Rows behind the last sequence."""
    sinks: bool = False
    alibi: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join(f"{k}={v}" for k, v in zip(self._fields, self, strict=True) if v not in (None, False, (), 0))


def option(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


CASES = [
    Case((70,)),
    Case((1, 63, 65, 5), H=4, Hk=4),
    Case((1, 63, 65, 5), options=option(causal=True)),
    Case((30, 0, 41, 0, 0, 66, 0), options=option(causal=True)),  # of length zero: first, between, last
    Case((0, 30, 1, 64), rest=13, options=option(causal=True)),
    Case((7, 3), rest=130),
    Case((64, 64, 2), H=6, Hk=2, options=option(causal=True)),  # grouped
    Case((48,), H=8, Hk=1, D=40, Dv=24, options=option(causal="bottom-right")),
    Case((17, 60, 3, 40), (60, 17, 50, 40), H=4, Hk=2),
    Case((17, 60, 3, 40), (60, 17, 50, 40), options=option(causal="top-left")),
    Case((17, 60, 3, 40), (60, 17, 50, 40), rest=9, options=option(causal="bottom-right")),
    Case((100, 1, 33), (2, 70, 0), options=option(causal="bottom-right")),  # many more queries than keys; none
    Case((5, 0, 40), (0, 30, 20), rest=3, sinks=True, options=option(causal=True)),
    Case((1, 1, 1, 1), (30, 65, 1, 7), H=4, Hk=1, options=option(causal="bottom-right")),  # generation with a cache
    Case((70, 50), options=option(causal=True, window=(20, 0))),
    Case((70, 50), (50, 90), options=option(causal="bottom-right", window=(16, 0)), rest=5),
    Case((70, 50), (50, 90), options=option(window=(7, 12))),
    Case((65, 31), options=option(causal=True, softcap=1.0, scale=1.0)),
    Case((65, 31), (31, 66), H=4, alibi=True, options=option(causal="bottom-right")),
    Case((65, 31), (31, 66), H=4, alibi=True),
    Case((65, 0, 31), H=4, sinks=True, rest=4, options=option(causal=True, window=(20, 0))),
    Case((65, 31), options=option(causal=True, dropout=0.3)),
    Case((20, 31, 30), (31, 66, 0), H=4, Hk=2, D=24, Dv=40, rest=7, sinks=True, alibi=True,
         options=option(causal="bottom-right", window=(20, 0), softcap=2.0, scale=0.5, dropout=0.2)),
    Case((19, 8, 30), D=1, Dv=1, options=option(causal=True)),
    Case((19, 8, 30), D=111, Dv=80),
    Case((19, 8, 30), D=256, Dv=256, options=option(softcap=3.0)),
]  # fmt: skip


class Problem(NamedTuple):
    tensors: list[Tensor | None]
    """q, k, v packed, and sinks."""
    starts: tuple[list[int], list[int]]
    """The running sums of the lengths, of queries and of keys."""
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """Those of attention_varlen past q, k and v. The longest lengths may be given too large."""
        first, second = (torch.tensor(s, dtype=torch.int32) for s in self.starts)
        longest = [max((b - a for a, b in pairwise(s)), default=0) for s in self.starts]
        if self.starts[0] == self.starts[1]:
            return {"cu_seqlens_q": first, "max_seqlen_q": longest[0] + 3}
        return {"cu_seqlens_q": first, "cu_seqlens_k": second, "max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}

    def alone(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each sequence by the formula, written for one; what stands behind the last is 0 and -inf."""
        total, h = q.shape[:2]
        outs, lses = [], []
        options = {**self.options}
        p = options.pop("dropout", 0.0)
        for (a, b), (c, d) in zip(*map(pairwise, self.starts), strict=True):
            one = [x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d])]
            keep = kept(dropout_seed(), p, 1, h, total, d - c)[:, :, a:b] if p else None
            out, lse = formula(*one, sinks=sinks, dropout=p, keep=keep, **options)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        rest = total - self.starts[0][-1]
        outs.append(q.new_zeros(rest, h, v.shape[2]))
        lses.append(q.new_full((h, rest), -INF))
        return torch.cat(outs), torch.cat(lses, 1)

    def run(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(SEED)
        return ops.attention_varlen(q, k, v, **self.arguments(), sinks=sinks, return_lse=True, **self.options)


def make_problem(case: Case, dtype: torch.dtype = torch.float32) -> Problem:
    starts = [list(accumulate(lengths, initial=0)) for lengths in (case.lengths, case.keys or case.lengths)]
    q = torch.randn(starts[0][-1] + case.rest, case.H, case.D)
    k = torch.randn(starts[1][-1] + case.rest, case.Hk, case.D)
    v = torch.randn(starts[1][-1] + case.rest, case.Hk, case.Dv)
    options = dict(case.options) | ({"alibi_slopes": torch.rand(case.H) / 4} if case.alibi else {})
    sinks = torch.randn(case.H) if case.sinks else None
    return Problem([*(x.to(dtype) for x in (q, k, v)), sinks], (starts[0], starts[1]), options)


@cache
def _prepared(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Problem, Expected]:
    problem = make_problem(case, dtype)
    oracle, oracle_grads = differentiate(problem.alone, [None if x is None else x.double() for x in problem.tensors])
    (out, _), grads = differentiate(problem.alone, [None if x is None else x.to(dtype) for x in problem.tensors])
    _, lse = problem.alone(*(None if x is None else x.float() for x in problem.tensors))
    return problem, Expected(oracle, oracle_grads, out, lse, grads)


@each_pair
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, case: Case) -> None:
    problem, expected = _prepared(case, dtype, torch.get_default_device())
    with on(backend):
        if refuses(OP, backend, torch.ones(1, dtype=dtype), FEATURES):
            with pytest.raises(fastlm.UnsupportedError, match=r"it has no|dtype is float32"):
                differentiate(problem.run, problem.tensors)
            return
        (out, lse), grads = differentiate(problem.run, problem.tensors)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    expected.assert_matched(out, lse, ("dq", "dk", "dv", "dsinks")[: len(grads)], grads)
    used = problem.starts[0][-1], problem.starts[1][-1], problem.starts[1][-1]
    assert all(bool((g[n:] == 0).all()) for g, n in zip(grads[:3], used, strict=True))


@each_able
def test_who_sees_whom(backend: str) -> None:
    """Weights of logits of 0 over values that name their key, at lengths around a tile."""
    lengths, keys = (15, 16, 17, 0, 33, 1), (17, 33, 15, 5, 1, 16)
    starts = [list(accumulate(n, initial=0)) for n in (lengths, keys)]
    first, second = (torch.tensor(s, dtype=torch.int32) for s in starts)
    q, k, v = (x.to(finest(backend)) for x in (torch.zeros(82, 1, 8), torch.randn(87, 1, 8), torch.eye(87)[:, None]))
    for causal in (False, "top-left", "bottom-right"):
        for window in (None, (0, 0), (15, 3), (None, 2)):
            want = torch.zeros(82, 87, dtype=torch.bool)
            for n, (s, t) in enumerate(zip(lengths, keys, strict=True)):
                a, c = starts[0][n], starts[1][n]
                want[a : a + s, c : c + t] = visible(s, t, causal, window)[0]
            with on(backend):
                out, lse = ops.attention_varlen(q, k, v, first, second, max_seqlen_q=33, max_seqlen_k=33,
                                                causal=causal, window=window, return_lse=True)  # fmt: skip
            assert torch.equal(out[:, 0] > 0, want), (causal, window)
            assert torch.equal(lse[0].exp().round(), want.sum(-1).float()), (causal, window)


@each_able
@pytest.mark.parametrize("rows", [0, 6])
def test_empty(backend: str, rows: int) -> None:
    """No rows; no sequences; sequences without rows."""
    for starts in ([0], [0, 0, 0]):
        cu = torch.tensor(starts, dtype=torch.int32)
        tensors = [torch.randn(rows, n, 8).to(finest(backend)) for n in (4, 2, 2)]
        run = lambda *x, cu=cu: ops.attention_varlen(*x, cu, max_seqlen_q=0, return_lse=True)  # noqa: E731
        with on(backend):
            (out, lse), grads = differentiate(run, tensors)
        assert out.shape == (rows, 4, 8) and bool((out == 0).all())
        assert lse.shape == (4, rows) and bool((lse == -INF).all())
        assert all(bool((g == 0).all()) for g in grads)


@taken(*FEATURES)
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_stays_in_its_sequence(backend: str, dtype: torch.dtype, bad: float) -> None:
    """Behind the last sequence, in anything; in keys and values of a neighbour that shares tiles."""
    problem = make_problem(Case((20, 30, 25), H=4, Hk=2, rest=11, sinks=True, options=option(causal=True)), dtype)
    inputs = [x for x in problem.tensors if x is not None]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(86, 4, 32, generator=generator, device="cpu").to(inputs[0].device, dtype),
                torch.randn(4, 86, generator=generator, device="cpu").to(inputs[0].device)]  # fmt: skip
    with on(backend):
        (out, lse), grads = differentiate(problem.run, inputs, upstream)
        for rows, behind in ((slice(75, 86), True), (slice(20, 50), False)):
            spoiled, spoiled_upstream = [x.clone() for x in inputs], [x.clone() for x in upstream]
            for x in (*spoiled[:3], spoiled_upstream[0]) if behind else spoiled[1:3]:
                x[rows] = bad
            if behind:
                spoiled_upstream[1][:, rows] = bad
            (other, other_lse), other_grads = differentiate(problem.run, spoiled, spoiled_upstream)
            fine = torch.ones(86, dtype=torch.bool)
            fine[rows] = False
            pairs = [(other[fine], out[fine]), (other_lse[:, fine], lse[:, fine])]
            pairs += [(a[fine], b[fine]) for a, b in zip(other_grads[:3], grads[:3], strict=True)]
            if behind:
                assert all(bool((x[rows] == 0).all()) for x in (other, *other_grads[:3]))
                pairs.append((other_grads[3], grads[3]))
            for actual, want in pairs:
                if backend in ("cuda", "cuda-shuffled-90"):  # rows that its copies spoil are summed again, key by key
                    torch.testing.assert_close(actual, want, atol=tolerance, rtol=tolerance)
                else:
                    assert_same_values(backend, [actual], [want], str(rows))


@each_able
def test_the_same_as_documents_and_as_a_batch(backend: str) -> None:
    """One kernel's tiles differ between the three, the sums do not but for their order."""
    q, k, v = (torch.randn(60, n, 16).to(finest(backend)) for n in (4, 2, 2))
    cu = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    ids = (torch.arange(60) // 20).unsqueeze(0)
    with on(backend):
        packed = ops.attention_varlen(q, k, v, cu, max_seqlen_q=20, causal=True)
        one = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        documents = ops.attention(*one, documents=ids, causal=True)[0].transpose(0, 1)
        batch = ops.attention(*(x.view(3, 20, -1, 16).transpose(1, 2) for x in (q, k, v)), causal=True)
    torch.testing.assert_close(packed, documents, **near(q.dtype))
    torch.testing.assert_close(packed, batch.transpose(1, 2).reshape(60, 4, 16), **near(q.dtype))


@each_able
def test_every_layout_gives_the_same(backend: str) -> None:
    """Packed projections, slices that break alignment, heads first, stride-0 keys; expanded upstream gradients."""
    case, dtype = Case((20, 33), H=2, Hk=2, D=24, Dv=24, rest=2, options=option(causal=True)), finest(backend)
    problem = make_problem(case, dtype)
    q, k, v = (x for x in problem.tensors if x is not None)
    run = lambda *x: problem.run(*x, None)[0]  # noqa: E731
    with on(backend):
        out, grads = differentiate(run, [q, k, v])
        packed = torch.full((55, 3, 2, 25), float("nan"), dtype=dtype)
        packed[..., 1:] = torch.stack([q, k, v], 1)
        for views in (
            [packed[:, i, :, 1:] for i in range(3)],
            [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
            [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)],
        ):
            other, other_grads = differentiate(run, views)
            assert_same_values(backend, [*other, *other_grads], [*out, *grads])
        wide = [q, k[:, :1].expand(55, 2, 24), v[:, :1].expand(55, 2, 24)]
        expected = differentiate(run, [x.contiguous() for x in wide])
        other = differentiate(run, wide)
        assert_same_values(backend, [*other[0], *other[1]], [*expected[0], *expected[1]])
        grad = torch.randn(1, 1, 24).expand(55, 2, 24)
        _, expected_grads = differentiate(run, [q, k, v], [grad.contiguous()])
        _, other_grads = differentiate(run, [q, k, v], [grad])
        assert_same_values(backend, other_grads, expected_grads, "upstream")


@each_able
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["finest", "bfloat16"])
def test_same_bits_again(backend: str, dtype: torch.dtype | None) -> None:
    case = Case((50, 0, 70, 9), H=4, Hk=2, sinks=True, rest=3, options=option(causal=True, dropout=0.1))
    problem = make_problem(case, dtype or finest(backend))
    with on(backend):
        first, second = (differentiate(problem.run, problem.tensors) for _ in range(2))
    assert_same_bits([*first[0], *first[1]], [*second[0], *second[1]])


@each_able
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        for lengths in ((10, 23), (31, 0, 4)):
            problem = make_problem(Case(lengths, options=option(causal=True, window=(5, 0))), finest(backend))
            run = partial(ops.attention_varlen, **problem.arguments(), **problem.options)
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            expected, actual = (differentiate(f, problem.tensors[:3]) for f in (run, compiled))
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


def test_gradcheck() -> None:
    case = Case((3, 0, 4), (2, 3, 6), H=4, Hk=2, D=4, Dv=2, rest=1, sinks=True, alibi=True,
                options=option(causal="bottom-right", window=(2, 0), softcap=1.0, dropout=0.3))  # fmt: skip
    problem = make_problem(case)
    inputs = [x.double().requires_grad_() for x in problem.tensors if x is not None]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = problem.run(*tensors)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


CU = torch.tensor([0, 2, 5], dtype=torch.int32)
ARGUMENTS = {
    "q": torch.ones(5, 4, 8), "k": torch.ones(5, 2, 8), "v": torch.ones(5, 2, 6), "cu_seqlens_q": CU, "max_seqlen_q": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": torch.ones(1, 5, 4, 8)}, ValueError, r"q must be \(total, heads, head dim\), got shape"),
        ({"k": torch.ones(5, 2, 7)}, ValueError, r"k must be \(total, heads, 8\) to go with q"),
        ({"v": torch.ones(4, 2, 6)}, ValueError, r"v must be \(5, 2, head dim\) to go with k"),
        ({"k": torch.ones(5, 3, 8), "v": torch.ones(5, 3, 6)}, ValueError, "heads of q"),
        ({"cu_seqlens_q": CU.long()}, TypeError, r"cu_seqlens_q must be torch.int32, got torch.int64"),
        ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a Tensor"),
        ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q must be \(sequences \+ 1,\), got \(1, 3\)"),
        ({"cu_seqlens_q": CU[:0]}, ValueError, r"cu_seqlens_q must be \(sequences \+ 1,\), got \(0,\)"),
        ({"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q must be on the device of q"),
        ({"cu_seqlens_k": CU[:2], "max_seqlen_k": 2}, ValueError, "cu_seqlens_k must have the shape of cu_seqlens_q"),
        ({"cu_seqlens_k": CU.clone()}, ValueError, "max_seqlen_k must be given with cu_seqlens_k"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be an integer of at least 0, got -1"),
        ({"max_seqlen_q": 3.0}, ValueError, "max_seqlen_q must be an integer"),
        ({"alibi_slopes": torch.ones(2, 4)}, ValueError, "alibi_slopes must be"),
        ({"causal": "left"}, ValueError, "causal must be"),
        ({"dropout": -0.1}, ValueError, "dropout must be in"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.attention_varlen(**ARGUMENTS | changes)
