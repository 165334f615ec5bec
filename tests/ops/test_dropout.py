"""dropout and dropout_add: every backend drops what the hash says, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKWARD,
    FORWARD,
    assert_all_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_backend,
    each_dtype,
    layouts,
    on,
)
from tests.ops.test_norm_dropout import next_mask

SHAPES = [(0, 8), (1, 1), (3, 17), (2, 3, 256), (65, 33)]
MIXED = [(d, d) for d in (torch.float32, torch.bfloat16, torch.float16)] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@each_backend
@pytest.mark.parametrize(("dtype", "stream"), MIXED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_add_matches_float64(backend: str, dtype: torch.dtype, stream: torch.dtype, shape, p: float) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(stream)
    keep = next_mask(shape, p) if p else torch.ones(shape, dtype=torch.bool)

    def formula(x: Tensor, residual: Tensor) -> Tensor:
        return (torch.where(keep, x / (1 - p), 0) + residual).to(residual.dtype)

    with on(backend):
        outputs, grads = differentiate(lambda x, r: ops.dropout_add(x, r, p), [x, residual])
    oracle, oracle_grads = differentiate(formula, [x.double(), residual.double()])
    eager, eager_grads = differentiate(formula, [x, residual])
    assert [outputs[0].dtype, *(g.dtype for g in grads)] == [stream, dtype, stream]
    assert_all_accurate(["y"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(["dx", "dresidual"], grads, oracle_grads, eager_grads, BACKWARD)
    assert bool((grads[0][~keep] == 0).all())


@each_backend
@each_dtype
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.999])
def test_drops_what_the_hash_says(backend: str, dtype: torch.dtype, p: float) -> None:
    keep = next_mask((40, 1000), p)
    with on(backend):
        (y,), (dx,) = differentiate(
            lambda x: ops.dropout(x, p), [torch.ones(40, 1000).to(dtype)], [torch.ones(40, 1000)]
        )
    assert torch.equal(y != 0, keep) and torch.equal(dx, y)
    torch.testing.assert_close(y[keep], torch.full_like(y[keep], 1 / (1 - p)))


@each_backend
def test_layouts_and_threads(backend: str) -> None:
    x, residual = torch.randn(300, 201), torch.randn(300, 201)

    def run(x: Tensor, residual: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        outputs, grads = differentiate(lambda x, r: ops.dropout_add(x, r, 0.4), [x, residual])
        return [*outputs, *grads]

    with on(backend):
        expected = run(x, residual)
        for (name, a), (_, b) in zip(layouts(x), layouts(residual), strict=True):
            assert_same_values(backend, run(a, b), expected, name)
        torch.set_num_threads(1)
        assert_same_bits(run(x, residual), expected)


@each_backend
def test_nothing_to_drop_is_the_tensor_itself(backend: str) -> None:
    x = torch.randn(3, 4)
    with on(backend):
        assert ops.dropout(x, 0.0) is x


@each_backend
def test_torch_compile_fullgraph_and_opcheck(backend: str) -> None:
    torch._dynamo.reset()
    name, x, seed = backend.partition("-")[0], torch.randn(4, 12), torch.tensor([5])
    with on(backend):
        compiled = torch.compile(lambda x, r: ops.dropout_add(x, r) * 2, fullgraph=True, backend="aot_eager")
        (y,), grads = differentiate(compiled, [x.bfloat16(), x])
        (want,), wanted = differentiate(lambda x, r: ops.dropout_add(x, r) * 2, [x.bfloat16(), x])
        assert_same_bits([y, *grads], [want, *wanted])
        torch.library.opcheck(torch.ops.fastlm.dropout_forward, (x, None, seed, 0.5, name))
        torch.library.opcheck(torch.ops.fastlm.dropout_backward, (x, torch.bfloat16, seed, 0.5, name))


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(3, 6).requires_grad_()
    with on(backend):
        (dx,) = torch.autograd.grad(ops.dropout(x, 0.5), x, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.dropout(torch.ones(2, dtype=torch.int64), 0.1), TypeError, "x must be floating point"),
        (lambda: ops.dropout(torch.ones(()), 0.1), ValueError, "at least one dimension"),
        (lambda: ops.dropout(torch.ones(2), 1.0), ValueError, r"dropout must be in \[0, 1\)"),
        (lambda: ops.dropout_add(torch.ones(2), torch.ones(3)), ValueError, "residual must be"),
        (lambda: ops.dropout(torch.ones(2).double(), 0.1, backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
