"""adam_step and grad_norm: every case on every backend and instruction set, against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm.ops.adam import OP, Prepared
from tests.ops.adam_problem import LOW, Problem, duplicate, make, quantized
from tests.ops.harness import (
    BACKENDS,
    FORWARD,
    assert_accurate,
    assert_same_bits,
    each_backend,
    each_dtype,
    layouts,
    on,
    refuses,
    sizes,
)  # fmt: skip


@each_backend
@each_dtype
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_matches_float64(backend: str, dtype: torch.dtype, amsgrad: bool, decoupled: bool) -> None:
    params, grads = make(dtype), [make(dtype) for _ in range(sizes(5, 3))]
    options = {"weight_decay": 0.1, "eps": 1e-4, "decoupled": decoupled, "maximize": amsgrad}
    ours, oracle = Problem(params, amsgrad=amsgrad), Problem([p.double() for p in params], amsgrad=amsgrad)
    eager_params = [torch.nn.Parameter(p.clone()) for p in params]
    eager = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        eager_params, lr=1e-2, weight_decay=0.1, eps=1e-4, amsgrad=amsgrad, maximize=amsgrad, foreach=False
    )
    for g in grads:
        with on(backend):
            ours.step(g, **options)
        oracle.step([t.double() for t in g], **options)
        for p, t in zip(eager_params, g, strict=True):
            p.grad = t
        eager.step()
    for i, p in enumerate(eager_params):
        state = eager.state[p]
        assert_accurate(f"param {i}", ours.params[i], oracle.params[i], p.detach(), FORWARD)
        if decoupled or dtype is torch.float32:  # else the moments hold the rounded parameters' decay
            assert_accurate(f"exp_avg {i}", ours.exp_avgs[i], oracle.exp_avgs[i], state["exp_avg"], FORWARD)
            assert_accurate(f"exp_avg_sq {i}", ours.exp_avg_sqs[i], oracle.exp_avg_sqs[i], state["exp_avg_sq"], FORWARD)
        assert ours.steps[i] == len(grads)


def test_the_float64_oracle_is_torch() -> None:
    params, grads = make(torch.float64), make(torch.float64)
    for amsgrad in (False, True):
        ours, theirs = Problem(params, amsgrad=amsgrad), [torch.nn.Parameter(p.clone()) for p in params]
        eager = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, amsgrad=amsgrad)
        for _ in range(3):
            ours.step(grads, weight_decay=0.1, decoupled=True)
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g
            eager.step()
        torch.testing.assert_close(ours.params, [p.detach() for p in theirs], rtol=1e-13, atol=1e-15)


@each_backend
@pytest.mark.parametrize("step", [0, 1, 9_999_999, 16_777_214])
def test_bias_correction_at_any_step(backend: str, step: int) -> None:
    params, grads = make(torch.float32, [(100,)]), make(torch.float32, [(100,)])
    ours, oracle = Problem(params), Problem([p.double() for p in params])
    for problem in (ours, oracle):
        problem.steps[0].fill_(step)
        for t in problem.exp_avgs + problem.exp_avg_sqs:
            t.fill_(0.25)
    with on(backend):
        ours.step(grads, lr=1.0, betas=(0.9, 0.9999999))
    oracle.step([g.double() for g in grads], lr=1.0, betas=(0.9, 0.9999999))
    assert ours.steps[0] == step + 1
    torch.testing.assert_close(ours.params[0].double(), oracle.params[0], rtol=3e-6, atol=3e-6)


@each_backend
@each_dtype
def test_scale_and_found_inf(backend: str, dtype: torch.dtype) -> None:
    params, grads = make(dtype), make(dtype)
    plain, scaled = Problem(params), Problem(params)
    with on(backend):
        plain.step(grads)
        scaled.step([g * 64 for g in grads], grad_scale=torch.tensor(64.0), found_inf=torch.tensor(0.0))
        assert_same_bits(scaled.tensors(), plain.tensors())
        before = [t.clone() for t in plain.tensors()]
        bad = [torch.full_like(g, float("inf")) for g in grads]
        plain.step(bad, found_inf=torch.tensor(1.0))
        plain.step(bad, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0))
    assert_same_bits(plain.tensors(), before)


@each_backend
def test_lr_as_a_tensor(backend: str) -> None:
    params, grads = make(torch.float32, [(50,)]), make(torch.float32, [(50,)])
    plain = Problem(params)
    with on(backend):
        plain.step(grads, lr=0.25, weight_decay=0.1, decoupled=True)
        for dtype in (torch.float32, torch.float64):
            problem = Problem(params)
            problem.step(grads, lr=torch.tensor(0.25, dtype=dtype), weight_decay=0.1, decoupled=True)
            assert_same_bits(problem.tensors(), plain.tensors())


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    """Any layout of parameter, gradient and state, mixed, gives the same numbers and touches nothing between them."""
    param, grads = make(dtype, [(6, 5, 48)]), [make(dtype, [(6, 5, 48)])[0] for _ in range(2)]
    with on(backend):
        plain = Problem(param, amsgrad=True)
        for g in grads:
            plain.step([g])
        for name, view in layouts(param[0]):
            for other, first in layouts(grads[0]):
                problem = Problem(param, amsgrad=True)
                problem.params = [view.clone() if name == "contiguous" else view]
                kept = view.clone()
                problem.step([first])
                problem.step([grads[1].expand(grads[1].shape)])
                for mine, theirs in zip(problem.tensors(), plain.tensors(), strict=True):
                    assert torch.equal(mine, theirs), f"parameter {name}, gradient {other}"
                view.copy_(kept)


@each_backend
def test_gradients_of_another_dtype(backend: str) -> None:
    params, grads = make(torch.bfloat16), make(torch.float32)
    a, b = Problem(params), Problem(params)
    with on(backend):
        a.step([g.bfloat16().float() for g in grads])
        b.step([g.bfloat16() for g in grads])
    assert_same_bits(a.tensors(), b.tensors())


@each_backend
@each_dtype
def test_same_bits_again_and_for_any_thread_count(backend: str, dtype: torch.dtype) -> None:
    shapes = sizes([(100_001,), (7,), (300, 301)], [(5001,), (7,), (3, 301)])
    params, grads = make(dtype, shapes), make(dtype, shapes)
    problems = [Problem(params, seeds=dtype is not torch.float32) for _ in range(3)]
    norms = []
    for threads, problem in zip((2, 2, 1), problems, strict=True):
        torch.set_num_threads(threads)
        with on(backend):
            problem.step(grads)
            norms.append(ops.grad_norm(grads))
    for other, norm in zip(problems[1:], norms[1:], strict=True):
        assert_same_bits(other.tensors(), problems[0].tensors())
        assert backend == "reference" or torch.equal(norm, norms[0])


# --- 16-bit parameters -----------------------------------------------------------------------------------------------


@each_backend
@LOW
def test_masters_follow_float32(backend: str, dtype: torch.dtype) -> None:
    params, grads = make(dtype), make(dtype)
    low, full = Problem(params, masters=True), Problem([p.float() for p in params])
    with on(backend):
        for _ in range(4):
            low.step(grads, weight_decay=0.1, decoupled=True)
            full.step([g.float() for g in grads], weight_decay=0.1, decoupled=True)
        assert_same_bits(low.options["master_params"], full.params)
        assert_same_bits(low.params, [p.to(dtype) for p in full.params])
        # weights loaded into the parameter replace the copy's
        low.params[0].fill_(3.0)
        low.step(grads, lr=0.0)
    assert bool((low.options["master_params"][0] == 3.0).all())
    assert_same_bits(low.options["master_params"][3:], full.params[3:])


@each_backend
@LOW
@pytest.mark.parametrize("how", ["masters", "seeds"])
def test_updates_below_half_an_ulp_add_up(backend: str, dtype: torch.dtype, how: str) -> None:
    """10 000 steps, each far below what the parameter's dtype resolves: rounded to nearest, nothing would move."""
    steps, n = sizes(10_000 if backend != "reference" else 1_500, 300), 256
    distance = sizes(0.25, 0.06)
    lr = distance / steps
    problem = Problem([torch.ones(n, dtype=dtype)], **{how: True})
    plain = Problem([torch.ones(n, dtype=dtype)])
    grads = [torch.full((n,), 0.5, dtype=dtype)]
    with on(backend):
        for call in (problem, plain):
            prepared = Prepared(call.params, call.exp_avgs, call.exp_avg_sqs, call.steps, **call.options)
            for _ in range(steps):
                prepared.step(grads, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False)
    assert plain.params[0].float().mean() == 1.0
    assert abs(problem.params[0].float().mean().item() - (1 - distance)) < 0.01
    if how == "seeds":
        assert problem.params[0].unique().numel() > 3


@each_backend
@LOW
def test_stochastic_rounding_is_the_same_everywhere(backend: str, dtype: torch.dtype) -> None:
    shapes = [(sizes(20_000, 6_000),), (31, 7)]
    params, grads = make(dtype, shapes), make(dtype, shapes)
    results = []
    for name in ("reference", backend):
        problem = Problem(params, seeds=True)
        problem.params[1] = problem.params[1].t().contiguous().t()  # the index counts in memory order
        with on(name):
            problem.step(grads)
        results.append(problem.params)
    for a, b in zip(*results, strict=True):
        assert (a != b).float().mean() < 2e-3  # they differ where the unrounded values do


@LOW
@each_backend
def test_stochastic_rounding_is_unbiased(backend: str, dtype: torch.dtype) -> None:
    """Between two neighbours, at every magnitude (float16's subnormals too), the mean is the value itself."""
    n = sizes(1 << 16, 1 << 13)
    for value in (1.0, -3.0, 2.0**-14, -(2.0**-16), 6e-8, 1000.0):
        low = torch.full((n,), value, dtype=dtype)
        ulp = (torch.nextafter(low[0].abs(), torch.tensor(float("inf"), dtype=dtype)) - low[0].abs()).float().item()
        problem = Problem([low], seeds=True)
        with on(backend):  # the first step of Adam moves by lr, whatever the gradient
            problem.step([torch.full((n,), -1.0, dtype=dtype)], lr=0.25 * ulp)
        moved = (problem.params[0].float() - low.float()) / ulp
        assert set(moved.unique().tolist()) <= {-0.5, 0.0, 0.5, 1.0}
        assert abs(moved.mean().item() - 0.25) < sizes(0.02, 0.03), value


@each_backend
def test_stochastic_rounding_keeps_special_values(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0], dtype=dtype)
        problem = Problem([values], seeds=True)
        with on(backend):
            problem.step([torch.zeros(4, dtype=dtype)])
        assert_same_bits(problem.params, [values])
        assert problem.params[0][0].isnan()


@each_backend
def test_a_first_tensor_without_elements_changes_nothing_for_the_others(backend: str) -> None:
    params, grads = make(torch.bfloat16, [(0,), (300,)]), make(torch.bfloat16, [(0,), (300,)])
    for options in ({"masters": True}, {"amsgrad": True}, {"seeds": True}):
        with_empty, alone = Problem(params, **options), Problem(params[1:], **options)
        if "seeds" in options:
            alone.options["rounding_seeds"] = with_empty.options["rounding_seeds"][1:]
        with on(backend):
            for _ in range(2):
                with_empty.step(grads)
                alone.step(grads[1:])
        assert_same_bits([t for t in with_empty.tensors() if t.numel() > 1], [t for t in alone.tensors() if t.dim()])


# --- shadows ---------------------------------------------------------------------------------------------------------


@each_backend
@LOW
@pytest.mark.parametrize("bits", [32, 8])
def test_shadow_params(backend: str, dtype: torch.dtype, bits: int) -> None:
    """16-bit copies are the rounding of the new parameters, of any layout, and not written when found_inf is set."""
    params, grads = make(torch.float32), make(torch.float32)
    problem = quantized(params) if bits == 8 else Problem(params)
    plain = duplicate(problem)
    shadows = [torch.full_like(p, 7.0, dtype=dtype) for p in params]
    shadows[5] = torch.full_like(params[5].t().contiguous(), 7.0, dtype=dtype).t()
    padded = torch.full((2, params[6].numel() + 1), 7.0, dtype=dtype)
    shadows[6] = padded[0, 1:]  # whose address is not aligned
    problem.options["shadow_params"] = shadows
    features = {"shadow_params", *(["state_bits"] if bits == 8 else [])}
    if refuses(OP, backend, params[0], features):
        with on(backend), pytest.raises(fastlm.UnsupportedError, match="no shadow_params"):
            problem.step(grads)
        return
    with on(backend):
        problem.step(grads, weight_decay=0.1, decoupled=True)
        plain.step(grads, weight_decay=0.1, decoupled=True)
        assert_same_bits(problem.params, plain.params)
        assert_same_bits(shadows, [p.to(dtype) for p in plain.params])
        assert bool((padded[1] == 7).all()) and padded[0, 0] == 7
        before = [t.clone() for t in problem.tensors()]
        problem.step(grads, found_inf=torch.tensor(1.0))
    assert_same_bits(problem.tensors(), before)


# --- grad_norm -------------------------------------------------------------------------------------------------------


@each_backend
@each_dtype
def test_norm(backend: str, dtype: torch.dtype) -> None:
    grads = make(dtype)
    grads.append(grads[4][::2])
    grads.append(torch.randn(30, 20).to(dtype).t())
    grads.append(torch.randn(()).to(dtype).expand(9, 9))
    expected = torch.nn.utils.get_total_norm([g.double() for g in grads])
    with on(backend):
        actual = ops.grad_norm(grads)
        assert ops.grad_norm([]) == 0 and ops.grad_norm([torch.empty(0)]) == 0
        assert ops.grad_norm([torch.tensor([float("inf")]), torch.ones(3)]) == float("inf")
        assert ops.grad_norm([torch.tensor([float("nan")]), torch.ones(3)]).isnan()
    assert actual.dtype is torch.float32 and actual.dim() == 0
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_norm_over_dtypes() -> None:
    grads = [torch.randn(5), torch.randn(6).bfloat16(), torch.randn(7).double()]
    actual, expected = ops.grad_norm(grads), torch.cat([g.double() for g in grads]).norm()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


# --- the tables of the Triton kernels --------------------------------------------------------------------------------

triton_alone = pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])


@triton_alone
def test_chunks_of_many_and_of_huge_tensors(backend: str) -> None:
    from fastlm.kernels.adam import chunks

    owner, first = chunks([5, 0, 4096, 4097, 0, 2**33 + 1], 4096)
    assert owner[:4].tolist() == [0, 2, 3, 3] and len(owner) == 4 + 2**21 + 1 and owner[-1] == 5
    assert first.tolist() == [0, 1, 1, 2, 4, 4]


@triton_alone
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_elements_beyond_32_bits(backend: str, stochastic: bool) -> None:
    """The tail of a tensor of 2^33 elements, by a table that says so of memory that holds the tail alone."""
    from fastlm.kernels import adam

    dtype, before = torch.bfloat16 if stochastic else torch.float32, 1 << 33
    problem, plain = (Problem([torch.ones(5000, dtype=dtype)], seeds=stochastic) for _ in range(2))
    grads = make(dtype, [(5000,)])
    with on(backend):
        plain.step(grads)
        prepared = Prepared(problem.params, problem.exp_avgs, problem.exp_avg_sqs, problem.steps, **problem.options)
        tables = prepared._tensors
        table = tables.uploaded.view(len(adam.ROWS), 1)
        table[adam.ROWS.index("size")] += before
        table[adam.ROWS.index("first")] -= before // adam.CHUNK
        table[adam.ROWS.index("param")] -= before * dtype.itemsize
        for row in ("exp_avg", "exp_avg_sq"):
            table[adam.ROWS.index(row)] -= before * 4
        _, where = tables.where = [grads[0].data_ptr()], tables.upload([grads[0].data_ptr()])
        where -= before * dtype.itemsize
        prepared.step(grads, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False)
    assert_same_bits(problem.exp_avgs + problem.exp_avg_sqs, plain.exp_avgs + plain.exp_avg_sqs)
    if stochastic:  # the bits depend on the upper half of the index too
        assert not torch.equal(problem.params[0], plain.params[0])
        torch.testing.assert_close(problem.params[0], plain.params[0], rtol=2**-7, atol=0)
    else:
        assert_same_bits(problem.params, plain.params)


# --- the call --------------------------------------------------------------------------------------------------------


def test_subnormal_moments_are_flushed_only_beside_eps() -> None:
    """Without eps a subnormal second moment is all there is."""
    param = [torch.ones(64)]
    for eps in (0.0, 1e-8):
        problem = Problem(param)
        problem.step([torch.full((64,), 3e-21)], eps=eps, lr=0.5)
        assert bool(problem.params[0].isfinite().all())
    problem = Problem(param)
    problem.step([torch.full((64,), 3e-20)], eps=0.0, lr=0.5)
    torch.testing.assert_close(problem.params[0], torch.full((64,), 0.5), rtol=1e-2, atol=0)


def test_prepared_notices_moved_tensors() -> None:
    problem = Problem(make(torch.float32, [(4, 4), (3,)]))
    prepared = Prepared(problem.params, problem.exp_avgs, problem.exp_avg_sqs, problem.steps)
    assert prepared.current()
    problem.params[0].data = problem.params[0].data.clone()
    assert not prepared.current()


def test_versions_are_counted() -> None:
    problem = Problem(make(torch.float32, [(4,)]))
    leaf = problem.params[0].requires_grad_()
    loss = (leaf * leaf).sum()
    problem.step([torch.ones(4)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def call(change: dict[str, Any]) -> None:
    problem = Problem(make(torch.float32, [(2, 3)]))
    arguments = {
        "params": problem.params, "grads": make(torch.float32, [(2, 3)]), "exp_avgs": problem.exp_avgs,
        "exp_avg_sqs": problem.exp_avg_sqs, "steps": problem.steps, "lr": 1e-3,
    }  # fmt: skip
    before = copy.deepcopy(problem.tensors())
    try:
        ops.adam_step(**{**arguments, **change})
    finally:
        assert_same_bits(problem.tensors(), before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grads": []}, ValueError, "grads must hold 1"),
        ({"grads": [torch.ones(3, 2)]}, ValueError, r"grads must be \(2, 3\)"),
        ({"exp_avgs": [torch.ones(3)]}, ValueError, r"exp_avgs must be \(2, 3\) of torch.float32"),
        ({"exp_avg_sqs": [torch.ones(2, 3).bfloat16()]}, ValueError, "exp_avg_sqs must be"),
        ({"steps": [torch.ones((), dtype=torch.int64)]}, ValueError, "steps must be float32"),
        ({"master_params": [torch.ones(2, 3)]}, ValueError, "bfloat16 and float16 parameters"),
        ({"grads": [torch.ones(2, 3, dtype=torch.int64)]}, TypeError, "grad must be"),
        ({"params": [torch.ones(2, 3, dtype=torch.int64)]}, TypeError, "params must be floating point"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"exp_avgs": [torch.ones(2, 3).bfloat16()]}, ValueError, "bfloat16 moments are for bfloat16 parameters"),
        ({"exp_avg_absmaxes": [torch.ones(1)]}, ValueError, "exp_avg_sq_absmaxes must hold 1"),
        ({"shadow_params": [torch.ones(2, 3)]}, ValueError, "shadow_params must be bfloat16 or float16"),
        ({"shadow_params": [torch.ones(3).bfloat16()]}, ValueError, r"shadow_params must be \(2, 3\)"),
        (
            {"exp_avg_absmaxes": [torch.ones(2)], "exp_avg_sq_absmaxes": [torch.ones(1)]},
            ValueError,
            r"exp_avg_absmaxes must be \(1,\)",
        ),
        (
            {"exp_avg_absmaxes": [torch.ones(1)], "exp_avg_sq_absmaxes": [torch.ones(1)]},
            ValueError,
            "exp_avgs must be .* of torch.uint8",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(change)


def test_float64_and_fake_tensors_never_reach_a_pointer() -> None:
    assert OP.select(torch.ones(2).double()) == "reference"
    with pytest.raises(fastlm.UnsupportedError, match="float64"):
        OP.select(torch.ones(2).double(), "cpu")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    real = Problem([torch.ones(2)])
    with pytest.raises(TypeError, match="FakeTensor"):
        real.step([fake])
