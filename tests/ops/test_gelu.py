"""gelu: every case on every backend and instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKWARD,
    FORWARD,
    KERNELS,
    assert_all_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_backend,
    each_dtype,
    layouts,
    on,
)

SHAPES = [(), (1,), (0, 3), (2, 7), (15,), (16,), (17,), (3, 33), (17, 1025)]
forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


def compare(x: torch.Tensor, approximate: str, backend: str) -> None:
    oracle, oracle_grads = differentiate(lambda x: F.gelu(x, approximate=approximate), [x.double()])
    eager, eager_grads = differentiate(lambda x: F.gelu(x, approximate=approximate), [x])
    with on(backend):
        actual, grads = differentiate(lambda x: ops.gelu(x, approximate=approximate), [x])
    assert actual[0].dtype == x.dtype and actual[0].is_contiguous()
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD)
    assert_all_accurate(["dx"], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@each_dtype
@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, approximate: str, shape: tuple[int, ...]) -> None:
    compare(torch.randn(shape).to(dtype), approximate, backend)


@each_backend
@each_dtype
@forms
def test_every_magnitude(backend: str, dtype: torch.dtype, approximate: str) -> None:
    """From the linear part near zero to the far tails, one magnitude at a time so that large values hide nothing."""
    for low, high in [(-1e-3, 1e-3), (-1, 1), (-3, 0), (-8, -3), (0, 8), (-100, 100)]:
        compare(torch.linspace(low, high, 3001).to(dtype), approximate, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_tail_keeps_its_relative_precision(backend: str) -> None:
    x = torch.linspace(-12, 0, 5000)
    with on(backend):
        y, (dx,) = differentiate(ops.gelu, [x], [torch.ones_like(x)])
        assert ops.gelu(torch.tensor([float("inf")])).item() == float("inf")
    want = x.double() * torch.special.erfc(x.double() * -(0.5**0.5)) / 2
    assert ((y[0] - want).abs() <= 1e-5 * want.abs()).all()
    assert dx.isfinite().all()


@each_backend
@forms
def test_special_values(backend: str, approximate: str) -> None:
    x = torch.tensor([float("nan"), 1e18, -1e18, 0.0, -0.0, 1e-40])
    with on(backend):
        y = ops.gelu(x, approximate=approximate)
    expected = F.gelu(x.double(), approximate=approximate).float()
    torch.testing.assert_close(y, expected, equal_nan=True)


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 48).to(dtype)
    with on(backend):
        expected = differentiate(ops.gelu, [x])
        for name, view in layouts(x):
            outputs, grads = differentiate(ops.gelu, [view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        for grad in (torch.randn(6, 1, 1).expand(6, 5, 48), torch.randn(()).expand(6, 5, 48)):
            _, expected_grads = differentiate(ops.gelu, [x], [grad.contiguous()])
            _, grads = differentiate(ops.gelu, [x], [grad])
            assert_same_values(backend, grads, expected_grads)


@each_backend
@forms
def test_same_bits_again_and_for_any_thread_count(backend: str, approximate: str) -> None:
    x = torch.randn(300, 201)
    with on(backend):
        first = differentiate(lambda x: ops.gelu(x, approximate=approximate), [x])
        again = differentiate(lambda x: ops.gelu(x, approximate=approximate), [x])
        torch.set_num_threads(1)
        alone = differentiate(lambda x: ops.gelu(x, approximate=approximate), [x])
    for other in (again, *([alone] if backend != "reference" else [])):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x: ops.gelu(x) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            x = torch.randn(shape)
            expected = differentiate(lambda x: ops.gelu(x) * 2, [x])
            actual = differentiate(compiled, [x])
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    x = torch.randn(4, 12)
    with on(backend):
        torch.library.opcheck(torch.ops.fastlm.gelu_forward, (x, True, name))
        torch.library.opcheck(torch.ops.fastlm.gelu_backward, (torch.randn(4, 12), x, False, name))


@forms
def test_gradcheck(approximate: str) -> None:
    x = torch.randn(3, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.gelu(x, approximate=approximate), [x])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(3, 6).requires_grad_()
    with on(backend):
        (dx,) = torch.autograd.grad(ops.gelu(x), x, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.gelu(torch.ones(2, dtype=torch.int64)), TypeError, "x must be floating point"),
        (lambda: ops.gelu(torch.ones(2), approximate="fast"), ValueError, "approximate must be 'none' or 'tanh'"),
        (lambda: ops.gelu([1.0]), TypeError, "x must be a Tensor"),
        (lambda: ops.gelu(torch.ones(2).double(), backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
