"""embedding: every case on every backend, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKENDS,
    BACKWARD,
    assert_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_dtype,
    layouts,
    on,
    sizes,
)

each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.startswith("cpu")])
SHAPES = [  # ids, V, N
    ((1,), 1, 1), ((0,), 3, 4), ((), 5, 8), ((7,), 4, 0), ((3, 5), 11, 7), ((2, 3, 4), 33, 48), ((130,), 17, 33),
    ((40,), sizes(5000, 700), 64), ((600,), 9, 1025), ((257,), sizes(300, 40), 1000),
]  # fmt: skip


def compare(ids: Tensor, weight: Tensor, backend: str, padding_idx: int | None = None) -> None:
    """The forward is exact; of the gradients torch's in float32 is the yardstick, which rounds as often."""

    def formula(weight: Tensor) -> Tensor:
        return F.embedding(ids, weight, padding_idx)

    oracle, (want,) = differentiate(formula, [weight.double()])
    _, (eager,) = differentiate(formula, [weight.float()])
    with on(backend):
        actual, (grad,) = differentiate(lambda weight: ops.embedding(ids, weight, padding_idx), [weight])
    assert actual[0].dtype == grad.dtype == weight.dtype and actual[0].is_contiguous()
    assert torch.equal(actual[0].double(), oracle[0])
    assert_accurate("dweight", grad, want, eager.to(weight.dtype), BACKWARD)


@each_backend
@each_dtype
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, case) -> None:
    shape, v, n = case
    compare(torch.randint(0, v, shape), torch.randn(v, n).to(dtype), backend)


@each_backend
def test_int32_ids(backend: str) -> None:
    compare(torch.randint(0, 11, (3, 50), dtype=torch.int32), torch.randn(11, 24), backend, 2)


RUNS = {  # lengths of the runs of ids 0, 1, ... in sorted order: pieces of the sum are 128 positions
    "one": [1000],
    "whole pieces": [128, 256, 128],
    "one short of a piece": [127, 129, 1, 255, 257],
    "starts and ends within a piece": [100, 20, 7, 1, 0, 0, 200, 56, 300],
    "last of all": [3, 0, 0, 0, 0, 0, 0, 0, 500],
}


@each_backend
@each_dtype
@pytest.mark.parametrize("case", RUNS)
def test_runs_of_every_length(backend: str, dtype: torch.dtype, case: str) -> None:
    ids = torch.cat([torch.full((count,), i) for i, count in enumerate(RUNS[case])])
    compare(ids[torch.randperm(len(ids))], torch.randn(len(RUNS[case]), 40).to(dtype), backend)


@each_backend
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_gets_no_gradient(backend: str, padding_idx: int) -> None:
    ids = torch.cat((torch.full((300,), padding_idx % 10), torch.randint(0, 10, (60,))))
    compare(ids, torch.randn(10, 24), backend, padding_idx)
    with on(backend):
        _, (grad,) = differentiate(lambda weight: ops.embedding(ids, weight, padding_idx), [torch.randn(10, 24)])
    assert not grad[padding_idx].any() and grad.any(1).sum() == 9


@each_backend
def test_sums_are_rounded_once(backend: str) -> None:
    """4096 times 1 + 2^-7 in bfloat16: rounding every addition would stop at 256."""
    ids, weight = torch.zeros(4096, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.bfloat16)
    with on(backend):
        _, (grad,) = differentiate(lambda w: ops.embedding(ids, w), [weight], [torch.full((4096, 8), 1.0078125)])
    assert torch.equal(grad[0], torch.full((8,), 4096 * 1.0078125).bfloat16()) and not grad[1:].any()


@each_backend
@each_dtype
def test_ids_out_of_range(backend: str, dtype: torch.dtype) -> None:
    """IndexError from PyTorch on the CPU; from a kernel a row of NaN, and no gradient anywhere."""
    ids = torch.tensor([2, -1, 0, 5, 2**31, -(2**40), 2**62, 4])
    wrong = (ids < 0) | (ids >= 5)
    weight = torch.randn(5, 24).to(dtype)
    with on(backend):
        if backend == "reference" and ids.is_cpu:
            with pytest.raises(IndexError):
                ops.embedding(ids, weight)
            return
        (y,), (grad,) = differentiate(lambda weight: ops.embedding(ids, weight), [weight])
        _, (expected,) = differentiate(
            lambda weight: ops.embedding(ids[~wrong], weight), [weight], [upstream(y)[~wrong]]
        )
    assert y[wrong].isnan().all() and torch.equal(y[~wrong], weight[ids[~wrong]])
    assert_same_bits([grad], [expected])


def upstream(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(y.device, torch.bfloat16)


@each_backend
@each_dtype
def test_layouts_and_expanded_upstream(backend: str, dtype: torch.dtype) -> None:
    ids, weight = torch.randint(0, 12, (6, 10)), torch.randn(12, 48).to(dtype)
    with on(backend):
        expected = differentiate(lambda weight: ops.embedding(ids, weight), [weight])
        for name, view in layouts(weight):
            outputs, grads = differentiate(lambda weight: ops.embedding(ids, weight), [view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        outputs, grads = differentiate(lambda weight: ops.embedding(ids.t().contiguous().t(), weight), [weight])
        assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], "ids")
        for grad in (torch.randn(48).expand(6, 10, 48), torch.randn(6, 1, 1).expand(6, 10, 48),
                     torch.randn(6, 10, 49)[..., 1:], torch.randn(6, 48, 10).mT):  # fmt: skip
            _, wanted = differentiate(lambda weight: ops.embedding(ids, weight), [weight], [grad.contiguous()])
            _, grads = differentiate(lambda weight: ops.embedding(ids, weight), [weight], [grad])
            assert_same_values(backend, grads, wanted)


@each_backend
def test_same_bits_again(backend: str) -> None:
    ids, weight = torch.randint(0, 7, (900,)), torch.randn(7, 33)
    with on(backend):
        first = differentiate(lambda weight: ops.embedding(ids, weight), [weight])
        again = differentiate(lambda weight: ops.embedding(ids, weight), [weight])
    assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    weight = torch.randn(9, 16)
    with on(backend):
        compiled = torch.compile(lambda ids, w: ops.embedding(ids, w, 2) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 5), (2, 3, 5), (7, 5)]:
            ids = torch.randint(0, 9, shape)
            expected = differentiate(lambda w, ids=ids: ops.embedding(ids, w, 2) * 2, [weight])
            actual = differentiate(lambda w, ids=ids: compiled(ids, w), [weight])
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    ids = torch.randint(0, 5, (2, 3))
    with on(backend):
        torch.library.opcheck(torch.ops.fastlm.embedding_forward, (ids, torch.randn(5, 12), name))
        torch.library.opcheck(torch.ops.fastlm.embedding_backward, (torch.randn(2, 3, 12), ids, 5, 1, name))


def test_gradcheck() -> None:
    ids, weight = torch.tensor([[0, 2, 2], [3, 0, 1]]), torch.randn(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: ops.embedding(ids, weight), [weight])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    ids, weight = torch.tensor([0, 1, 0]), torch.randn(3, 6).requires_grad_()
    with on(backend):
        y = ops.embedding(ids, weight)
        (grad,) = torch.autograd.grad(y, weight, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (grad.square().sum() + weight.sum()).backward()


IDS, TABLE = torch.zeros(2, dtype=torch.int64), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.embedding(IDS, TABLE.long()), TypeError, "weight must be floating point"),
        (lambda: ops.embedding(IDS.float(), TABLE), TypeError, "ids must be torch.int64 or torch.int32"),
        (lambda: ops.embedding([0], TABLE), TypeError, "ids must be a Tensor"),
        (lambda: ops.embedding(IDS, torch.ones(3)), ValueError, r"weight must be \(V, N\)"),
        (lambda: ops.embedding(IDS, torch.ones(0, 3)), ValueError, "weight has no rows"),
        (lambda: ops.embedding(IDS.to("meta"), TABLE), ValueError, "ids must be on the device of weight"),
        (lambda: ops.embedding(IDS, TABLE, 3), ValueError, r"padding_idx must be in \[-3, 3\), got 3"),
        (lambda: ops.embedding(IDS, TABLE, backend="cpu"), fastlm.UnsupportedError, "no backend 'cpu'"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
