"""attention's options, alone and together: window, softcap, ALiBi, sinks, documents. Backends refuse what they lack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops.attention import OP
from tests.ops.attention_oracle import (
    BACKENDS,
    INF,
    Case,
    Problem,
    check,
    compare,
    each_backend,
    each_pair,
    finest,
    formula,
    make,
    make_problem,
    near,
    taken,
    visible,
)
from tests.ops.harness import assert_same_bits, assert_same_values, differentiate, on, refuses

one_of_each = pytest.mark.parametrize("backend", dict.fromkeys([BACKENDS[0], BACKENDS[-1]]))  # what no ISA changes
EVERY_FEATURE = ("window", "softcap", "alibi_slopes", "sinks", "documents", "cu_seqlens")


def takes(*features: str) -> pytest.MarkDecorator:
    """The backends that declare the features; that the others refuse them is what test_matches_float64 sees."""
    able = [b for b in BACKENDS if not refuses(OP, b, torch.ones(1, dtype=finest(b)), features)]
    return pytest.mark.parametrize("backend", able)


def option(S: int, T: int, causal: Any = False, mask: str = "", B: int = 1, H: int = 2, Hk: int = 1, D: int = 32,
           Dv: int = 32, **options: Any) -> Case:  # fmt: skip
    return Case(B, H, Hk, S, T, D, Dv, causal, mask, **options)


CASES = [
    # window: both edges of tiles, S != T, both alignments, neither
    option(70, 70, True, window=(1, 0)),
    option(129, 129, True, window=(64, 0)),
    option(129, 129, True, window=(63, None)),
    option(113, 113, False, window=(17, 5)),
    option(97, 130, False, window=(30, None)),
    option(97, 130, False, window=(None, 30)),
    option(130, 97, False, window=(0, 3)),
    option(40, 130, "top-left", window=(16, 0)),
    option(40, 130, "bottom-right", window=(16, 0)),
    option(130, 40, "bottom-right", window=(10, 0)),
    option(130, 40, "top-left", window=(10, 0)),
    option(70, 75, True, "bool (B,1,S,T)", 2, window=(20, 0)),
    option(70, 75, False, "float (H,S,T)", 2, window=(9, 20)),
    # softcap: its derivative, and bias after it
    option(65, 97, True, softcap=2.0, scale=1.5),
    option(97, 65, False, softcap=0.5, scale=1.0, Dv=24),
    option(66, 70, False, "float (1,H,S,T)", 2, softcap=1.0, scale=1.0),
    option(66, 70, True, "bool (B,1,1,T)", 2, softcap=30.0, scale=-0.7),
    # ALiBi
    option(130, 130, True, alibi="H", H=4, Hk=2),
    option(70, 97, False, alibi="BH", B=2, H=3),
    option(40, 97, "bottom-right", alibi="BH", B=2),
    option(97, 40, "bottom-right", alibi="H"),
    option(40, 97, "top-left", "float (H,1,T)", alibi="H"),
    # sinks
    option(129, 129, True, sinks="float32", B=2, H=6, Hk=2),
    option(63, 97, False, sinks="q"),
    option(97, 63, "bottom-right", sinks="q", B=2),
    option(50, 66, False, "bool (B,1,S,T)", 2, sinks="float32"),
    option(50, 66, False, "float (H,S,1)", 2, sinks="float32"),
    # documents
    option(130, 130, False, documents="sorted", B=2),
    option(130, 130, True, documents="sorted", B=2),
    option(97, 97, True, documents="random", B=2),
    option(70, 113, False, documents="pair", B=2),
    option(113, 70, "bottom-right", documents="pair", B=2),
    option(70, 70, False, "float (B,1,S,T)", 2, documents="random"),
    # together
    option(129, 129, True, window=(33, 0), sinks="float32", H=4, Hk=2),  # gpt-oss
    option(129, 129, True, window=(40, 0), softcap=5.0, scale=1.0),  # Gemma 2
    option(97, 97, True, alibi="H", documents="sorted", B=2),
    option(70, 97, "bottom-right", "float (H,1,T)", 2, window=(20, 0), softcap=2.0, alibi="BH", sinks="float32",
           documents="pair", scale=0.5),
    option(97, 70, False, "bool (B,1,1,T)", 2, window=(20, 7), softcap=2.0, alibi="H", sinks="q", documents="pair"),
    # one query or two, as in generation with a cache
    option(1, 130, "bottom-right", window=(60, 0), H=8, Hk=2, B=2),
    option(1, 130, "bottom-right", sinks="q", H=8),
    option(2, 130, "bottom-right", "bool (B,1,1,T)", window=(60, 0), sinks="q", B=2),
    option(2, 97, "bottom-right", alibi="H", softcap=1.0),
    option(1, 700, "bottom-right", window=(600, 0), H=12, Hk=1, sinks="float32"),  # keys shared among threads
    # head dims of no particular size
    option(9, 17, True, D=1, Dv=1, window=(4, 0), sinks="float32"),
    option(17, 20, True, D=40, Dv=80, window=(4, 0), alibi="H"),
    option(17, 20, False, D=111, Dv=56, softcap=1.0, sinks="float32"),
    option(20, 20, True, D=256, Dv=256, documents="random", sinks="float32"),
]  # fmt: skip

EVERYTHING = Case(2, 4, 2, 33, 40, 16, 8, "bottom-right", "float (H,1,T)", 0.3, (9, 0), 2.0, "BH", "float32", "pair",
                  dropout=0.2)  # fmt: skip


@each_pair
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, case: Case) -> None:
    compare(backend, case, dtype)


@takes("window")
def test_window_of_one_key(backend: str) -> None:
    """Weights of 1: gradients of q and k are 0 up to rounding."""
    dtype = finest(backend)
    tensors, upstream = make(Case(1, 2, 2, 70, 70, 32, 32), dtype), torch.randn(1, 2, 70, 32).to(dtype)
    with on(backend):
        (out,), grads = differentiate(lambda *x: ops.attention(*x, window=(0, 0)), tensors, [upstream])
    expected = [tensors[2], torch.zeros_like(upstream), torch.zeros_like(upstream), upstream]
    for actual, want in zip([out, *grads], expected, strict=True):
        torch.testing.assert_close(actual, want, atol=1e-5 if dtype is torch.float32 else 0.02, rtol=0)


@takes("window", "softcap", "alibi_slopes", "sinks", "documents")
@pytest.mark.parametrize("sizes", [{"B": 0}, {"S": 0}, {"T": 0}], ids=str)
def test_empty(backend: str, sizes: dict[str, int]) -> None:
    problem = make_problem(EVERYTHING._replace(dropout=None, **sizes), finest(backend))
    with on(backend):
        (out, lse), grads = problem.run(lambda *x, **o: ops.attention(*x, return_lse=True, **o))
    assert bool((out == 0).all()) and torch.equal(lse, problem.inputs[4][None, :, None].expand(lse.shape))
    assert all(bool((g == 0).all()) for g in grads[:-1]) and grads[-1].isfinite().all()


# --- who sees whom ----------------------------------------------------------------------------------------------------


def seen_by(s: int, t: int, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """Which keys get a weight, and how many, for logits of 0 and values that name their key."""
    q, k, v = torch.zeros(1, 1, s, 8), torch.randn(1, 1, t, 8), torch.eye(t).view(1, 1, t, t)
    out, lse = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), return_lse=True, **options)
    return out[0, 0] > 0, lse[0, 0].exp().round()


@takes("window")
@pytest.mark.parametrize("causal", [False, "top-left", "bottom-right"])
@pytest.mark.parametrize(("s", "t"), [(66, 66), (34, 70), (70, 34)])
def test_window_to_the_key(backend: str, causal: Any, s: int, t: int) -> None:
    with on(backend):
        for left in (0, 1, 15, 16, 17, 63, 64, 65, 1000, None):
            for right in (0, 1, 16, 31, 32, 33, -1) if not causal or left in (0, 17) else (0,):
                want, _ = visible(s, t, causal, (left, right))
                weights, count = seen_by(s, t, finest(backend), causal=causal, window=(left, right))
                assert torch.equal(weights, want), (left, right)
                assert torch.equal(count, want.sum(-1).float()), (left, right)


@each_backend
def test_windows_that_need_no_window(backend: str) -> None:
    """What causal alone says, or nothing, runs everywhere: no limit, one that is larger than S, one without a left."""
    tensors = make(Case(1, 2, 2, 40, 50, 16, 16), finest(backend))
    with on(backend):
        for window, causal, plain in (
            ((-1, -1), False, False),
            ((None, None), True, True),
            ((39, 49), False, False),
            ((1 << 40, -1), "bottom-right", "bottom-right"),
            ((49, 7), "bottom-right", "bottom-right"),
            ((39, 0), True, True),
            ((None, 0), False, True),
        ):
            actual = differentiate(lambda *x, c=causal, w=window: ops.attention(*x, causal=c, window=w), tensors)
            expected = differentiate(lambda *x, c=plain: ops.attention(*x, causal=c), tensors)
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])
    check(backend, tensors, window=(None, 11))


@takes("documents")
def test_documents_are_attention_of_each_alone(backend: str) -> None:
    q, k, v = make(Case(1, 2, 1, 100, 100, 16, 16), finest(backend))
    ids = torch.randint(3, (1, 100))
    with on(backend):
        whole = ops.attention(q, k, v, documents=ids, causal=True)
        for n in range(3):
            mine = ids[0] == n
            alone = ops.attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], causal=True)
            torch.testing.assert_close(whole[:, :, mine], alone, **near(q.dtype))


@takes("documents")
def test_ids_are_compared_whole(backend: str) -> None:
    """int64 ids that agree in their lower half; ids in memory every second one, and one row for all."""
    low = torch.arange(20) % 2
    ids = torch.stack([low + (torch.arange(20) % 3 << 32), low], -1).view(20, 2)[:, 0].expand(2, 20)
    tensors = make(Case(2, 1, 1, 20, 20, 8, 8), finest(backend))
    check(backend, tensors, documents=ids)
    with on(backend):
        expected = ops.attention(*tensors, documents=ids)
        again = ops.attention(*tensors, documents=(torch.arange(20) % 6).int().expand(2, 20))
    assert_same_values(backend, [again], [expected])


# --- sinks ------------------------------------------------------------------------------------------------------------


@taken("sinks")
def test_rows_that_see_the_sink_alone(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(Case(2, 4, 2, 70, 40, 16, 16), dtype)  # bottom-right: the first 30 queries see nothing
    sinks = torch.tensor([0.5, -90.0, 30.0, -INF])
    seen = torch.rand(2, 1, 70, 40) < 0.5
    seen[0, :, 50], seen[1, :, :, 16:32] = False, False
    blind = torch.zeros(2, 70, dtype=torch.bool)
    blind[:, :30], blind[0, 50] = True, True
    run = lambda q, k, v, s: ops.attention(q, k, v, mask=seen, sinks=s, causal="bottom-right", return_lse=True)  # noqa: E731
    with on(backend):
        (out, lse), grads = differentiate(run, [q, k, v, sinks])
        none = ops.attention(q, k, v, mask=seen, causal="bottom-right")
    rows = blind.unsqueeze(1).expand(2, 4, 70)
    assert bool((out[rows] == 0).all()) and bool((grads[0][rows] == 0).all())
    torch.testing.assert_close(lse[rows], sinks[None, :, None].expand(2, 4, 70)[rows])
    assert all(bool(g.isfinite().all()) for g in grads) and grads[3][3] == 0
    torch.testing.assert_close(out[:, 3], none[:, 3])  # no sink there
    check(backend, [q, k, v], seen, torch.randn(4), causal="bottom-right")


@takes("sinks")
@pytest.mark.parametrize("sink", [-3e4, 3e4, 100.0])
def test_sinks_far_from_the_logits(backend: str, sink: float) -> None:
    q, k, v = make(Case(1, 2, 2, 20, 70, 16, 16), finest(backend))
    problem = Problem([q, k, v, None, torch.full((2,), sink)], {"causal": "bottom-right"})
    with on(backend):
        out, grads = problem.run(ops.attention)
    oracle, oracle_grads = problem.run(lambda *x, **o: formula(*x, **o)[0], torch.float64)
    for actual, want in zip([*out, *grads], [*oracle, *oracle_grads], strict=True):
        atol = 1e-5 if actual.dtype is torch.float32 and q.dtype is actual.dtype else 5e-3
        torch.testing.assert_close(actual.double(), want, atol=atol, rtol=1e-2)  # lse near 3e4 has steps of 2e-3


@takes("sinks")
def test_gradient_of_the_sinks_sums_rows_and_batches(backend: str) -> None:
    """In float32 whatever the dtype of q is; each output alone; sinks expanded from one number."""
    q, k, v = make(Case(3, 4, 2, 100, 70, 16, 16), torch.bfloat16)
    one = torch.tensor([0.3], requires_grad=True)
    for used in (0, 1):
        result = formula(*(x.double() for x in (q, k, v)), sinks=one.double().expand(4))[used]
        upstream = torch.randn(result.shape)
        (want,) = torch.autograd.grad(result, one, upstream.double())
        with on(backend):
            result = ops.attention(q, k, v, sinks=one.expand(4), return_lse=True)[used]
        (actual,) = torch.autograd.grad(result, one, upstream.to(result.dtype))
        torch.testing.assert_close(actual, want, rtol=0.02, atol=0.02 * upstream.shape[2] ** 0.5)


# --- values that must not leak ----------------------------------------------------------------------------------------


@taken("window", "documents")
@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("kind", ["documents", "documents and softcap", "window"])
def test_hidden_nan_does_not_leak(backend: str, dtype: torch.dtype, bad: float, kind: str) -> None:
    """Keys that no query sees, beside keys that are seen."""
    q, k, v = make(Case(1, 2, 2, 40, 100, 32, 32), dtype)
    if kind == "window":  # queries stand at 60 to 99
        hidden, options = torch.arange(100) < 50, {"causal": "bottom-right", "window": (10, 0)}
    else:
        hidden = torch.rand(100) < 0.3
        ids = torch.randint(2, (1, 40)), torch.randint(2, (1, 100)).masked_fill(hidden, 7)
        options = {"documents": ids} | ({"softcap": 2.0} if "softcap" in kind else {})
    clean_k, clean_v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = bad, bad
    run = lambda *x: ops.attention(*x, **options)  # noqa: E731
    with on(backend):
        out, grads = differentiate(run, [q, k, v])
        expected, expected_grads = differentiate(run, [q, clean_k, clean_v])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
    for actual, want in zip([*out, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(actual, want, atol=tolerance, rtol=tolerance)


@takes("window")
def test_a_row_of_nan_stays_within_its_window(backend: str) -> None:
    q, k, v = make(Case(1, 1, 1, 100, 100, 16, 16), finest(backend))
    v[0, 0, 40, 3], k[0, 0, 70] = float("nan"), float("nan")
    seen, _ = visible(100, 100, True, (9, 0))
    with on(backend):
        out = ops.attention(q, k, v, causal=True, window=(9, 0))[0, 0]
    assert torch.equal(out[:, 3].isnan(), seen[:, 40] | seen[:, 70])
    assert torch.equal(out[:, 0].isnan(), seen[:, 70])


# --- the pattern around the kernel ------------------------------------------------------------------------------------


@takes("window", "softcap", "alibi_slopes", "sinks", "documents")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["finest", "bfloat16"])
def test_same_bits_again_and_for_any_thread_count(backend: str, dtype: torch.dtype | None) -> None:
    problem = make_problem(EVERYTHING._replace(B=1, S=70, T=90, window=(40, 0)), dtype or finest(backend))

    def run(*tensors: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(0)
        return ops.attention(*tensors, **options)

    results = []
    with on(backend):
        for threads in (2, 1, 3) if backend.startswith("cpu") else (2, 2):
            torch.set_num_threads(threads)
            out, grads = problem.run(run)
            results.append([*out, *grads])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@takes("window", "softcap", "alibi_slopes", "sinks", "documents")
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()

    def run(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return ops.attention(*tensors, return_lse=True, **options)

    with on(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for s in (33, 37):
            problem = make_problem(EVERYTHING._replace(S=s, dropout=None), finest(backend))
            expected, actual = problem.run(run), problem.run(compiled)
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@takes(*EVERY_FEATURE)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend: str, packed: bool) -> None:
    name = backend.partition("-")[0]
    if packed:
        q, k, v = (torch.randn(n, 2, 8).to(finest(backend)).transpose(0, 1).unsqueeze(0) for n in (12, 15, 15))
        cu = torch.tensor([0, 5, 5, 11], dtype=torch.int32), torch.tensor([0, 3, 9, 15], dtype=torch.int32)
        tensors = (q, k, v, None, torch.tensor([3]), torch.randn(2), torch.rand(2), None, None, *cu)
        options = (6, 6, 2, 3, -1, 5.0, 0.3, 0.1)
    else:
        problem = make_problem(EVERYTHING, finest(backend))
        q, k, v, mask, sinks = problem.inputs
        ids, slopes = problem.options["documents"], problem.options["alibi_slopes"]
        assert mask is not None
        tensors = (q, k, v, mask[None], torch.tensor([3]), sinks, slopes, *ids, None, None)
        options = (33, 40, 2, 9, -1, 2.0, 0.3, 0.1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with on(backend):
        library = torch.ops.fastlm
        torch.library.opcheck(library.attention_forward, (*tensors, *options, name), test_utils=tests)
        out, lse = library.attention_forward(*tensors, *options, name)
        arguments = (torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, *options, not packed, name)
        torch.library.opcheck(library.attention_backward, arguments, test_utils=tests)


GRADCHECKS = [
    EVERYTHING,
    EVERYTHING._replace(causal=False, window=(2, 3), mask="", dropout=None, documents="random", T=33),
    EVERYTHING._replace(causal=True, window=None, softcap=None, alibi="H", documents="", mask="float (S,1)"),
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck(case: Case) -> None:
    problem = make_problem(case._replace(S=5, T=6 if case.T != case.S else 5, D=4, Dv=2))
    inputs = [None if x is None else x.double().requires_grad_() for x in problem.inputs]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        out, lse = ops.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True, **problem.options)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


ARGUMENTS = {"q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 2, 5, 8), "v": torch.ones(2, 2, 5, 6)}
IDS = torch.zeros(2, 3, dtype=torch.int32)
KEY_IDS = torch.zeros(2, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"window": 3}, TypeError, "window must be a pair"),
        ({"window": (1, 2, 3)}, TypeError, "window must be a pair"),
        ({"window": (-2, 0)}, ValueError, "window must hold integers"),
        ({"window": (1.0, 0)}, ValueError, "window must hold integers"),
        ({"window": (True, 0)}, ValueError, "window must hold integers"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number"),
        ({"softcap": -3.0}, ValueError, "softcap must be a positive number"),
        ({"softcap": math.nan}, ValueError, "softcap must be a positive number"),
        ({"softcap": INF}, ValueError, "softcap must be a positive number"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, r"alibi_slopes must be \(4,\) or \(2, 4\), got \(2,\)"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes must be floating point"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a Tensor"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "alibi_slopes must not require a gradient"),
        ({"alibi_slopes": torch.ones(4, device="meta")}, ValueError, "alibi_slopes must be on the device of q"),
        ({"sinks": torch.ones(2, 4)}, ValueError, r"sinks must be \(4,\)"),
        ({"sinks": torch.ones(4).bool()}, TypeError, "sinks must be floating point"),
        ({"sinks": torch.ones(4, device="meta")}, ValueError, "sinks must be on the device of q"),
        ({"documents": IDS}, ValueError, "documents must be a pair"),
        ({"documents": (IDS, IDS)}, ValueError, r"documents must be \(2, 5\), got \(2, 3\)"),
        ({"documents": (IDS[0], KEY_IDS)}, ValueError, r"documents must be \(2, 3\), got \(3,\)"),
        ({"documents": (IDS, KEY_IDS.long())}, ValueError, "documents must be of one dtype"),
        ({"documents": (IDS.float(), KEY_IDS)}, TypeError, "documents must be torch.int32 or torch.int64"),
        ({"documents": (IDS.to("meta"), KEY_IDS)}, ValueError, "documents must be on the device of q"),
        ({"documents": "sorted"}, TypeError, "documents must be a Tensor, a pair"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.attention(**ARGUMENTS | changes)


def test_slopes_that_train_elsewhere_are_fine_without_gradients() -> None:
    slopes = torch.rand(4, requires_grad=True)
    with torch.no_grad():
        assert ops.attention(**ARGUMENTS, alibi_slopes=slopes, backend="reference").isfinite().all()
