"""swiglu and geglu, packed and in two tensors: every case on every backend and instruction set, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
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

SHAPES = [
    (1, 1),
    (2, 7),
    (0, 5),
    (5, 0),
    (65, 15),
    (3, 16),
    (3, 5, 17),
    (65, 33),
    (100,),
    (2, 768),
    (3, 1000),
    (9, 1025),
]
PAIRS = {
    "swiglu": (ops.swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu": (ops.geglu, lambda gate, up: F.gelu(gate) * up),
    "geglu tanh": (
        partial(ops.geglu, approximate="tanh"),
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    ),
}
each_function = pytest.mark.parametrize(("function", "torch_function"), PAIRS.values(), ids=PAIRS)
Function = Callable[..., Tensor]


def compare(gate: Tensor, up: Tensor, function: Function, torch_function: Function, backend: str) -> None:
    """Both forms; the packed one must give the same bits as the other."""
    oracle, oracle_grads = differentiate(torch_function, [gate.double(), up.double()])
    eager, eager_grads = differentiate(torch_function, [gate, up])
    with on(backend):
        actual, grads = differentiate(function, [gate, up])
        packed, packed_grads = differentiate(function, [torch.cat((gate, up), -1)])
    assert actual[0].dtype == gate.dtype and actual[0].is_contiguous()
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD)
    assert_all_accurate(["dgate", "dup"], grads, oracle_grads, eager_grads, BACKWARD)
    assert_same_values(backend, [*packed, *packed_grads], [*actual, torch.cat(grads, -1)], "packed")


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), *PAIRS["swiglu"], backend)


@each_backend
@each_dtype
@each_function
@pytest.mark.parametrize("shape", [(2, 7), (0, 5), (9, 1025)], ids=str)
def test_every_activation(
    backend: str, dtype: torch.dtype, function: Function, torch_function: Function, shape
) -> None:
    compare(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), function, torch_function, backend)


@each_backend
@each_dtype
@each_function
def test_every_magnitude(backend: str, dtype: torch.dtype, function: Function, torch_function: Function) -> None:
    for low, high in [(-1e-3, 1e-3), (-3, 0), (-20, -3), (0, 8), (-200, 200)]:
        gate = torch.linspace(low, high, 1001).to(dtype)
        compare(gate, torch.randn(1001).to(dtype), function, torch_function, backend)


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    gate, up = torch.randn(6, 5, 48).to(dtype), torch.randn(6, 5, 48).to(dtype)
    with on(backend):
        expected = differentiate(ops.swiglu, [gate, up])
        for name, view in layouts(gate):
            outputs, grads = differentiate(ops.swiglu, [view, up])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        for name, view in layouts(up):
            outputs, grads = differentiate(ops.swiglu, [gate, view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        packed = torch.cat((gate, up), -1)
        outputs, grads = differentiate(ops.swiglu, list(packed.chunk(2, -1)))  # halves of one tensor
        assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], "halves")
        for name, view in layouts(packed):
            outputs, grads = differentiate(ops.swiglu, [view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], torch.cat(expected[1], -1)], name)


@each_backend
def test_expanded_and_strided_upstream(backend: str) -> None:
    tensors = [torch.randn(10, 40), torch.randn(10, 40)]
    with on(backend):
        for grad in (torch.randn(10, 1).expand(10, 40), torch.randn(()).expand(10, 40), torch.randn(40, 10).t()):
            _, expected = differentiate(ops.swiglu, tensors, [grad.contiguous()])
            _, grads = differentiate(ops.swiglu, tensors, [grad])
            assert_same_values(backend, grads, expected)


@each_backend
@each_function
def test_same_bits_again_and_for_any_thread_count(backend: str, function: Function, torch_function: Function) -> None:
    gate = torch.randn(300, 402)
    with on(backend):
        first = differentiate(function, [gate])
        again = differentiate(function, [gate])
        torch.set_num_threads(1)
        alone = differentiate(function, [gate])
    for other in (again, *([alone] if backend != "reference" else [])):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x: ops.swiglu(x) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            x = torch.randn(shape)
            expected = differentiate(lambda x: ops.swiglu(x) * 2, [x])
            actual = differentiate(compiled, [x])
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    gate, up, dy = (torch.randn(4, 12) for _ in range(3))
    with on(backend):
        library = torch.ops.fastlm
        torch.library.opcheck(library.glu_forward, (gate, up, "silu", name))
        torch.library.opcheck(library.glu_forward, (gate, None, "gelu", name))
        torch.library.opcheck(library.glu_backward, (dy, gate, up, "gelu_tanh", name))
        torch.library.opcheck(library.glu_backward, (dy, torch.randn(4, 24), None, "silu", name))


@each_function
def test_gradcheck(function: Function, torch_function: Function) -> None:
    gate, up = (torch.randn(3, 6).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, [gate, up])
    assert torch.autograd.gradcheck(function, [gate])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(3, 6).requires_grad_()
    with on(backend):
        (dx,) = torch.autograd.grad(ops.swiglu(x), x, torch.randn(3, 3), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.swiglu(torch.ones(2, 4, dtype=torch.int64)), TypeError, "gate must be floating point"),
        (lambda: ops.swiglu(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.swiglu(torch.ones(2, 3)), ValueError, "must be even"),
        (lambda: ops.swiglu(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "up must be"),
        (lambda: ops.swiglu(torch.ones(2, 3), torch.ones(2, 3).bfloat16()), ValueError, "up must be"),
        (lambda: ops.swiglu(torch.ones(2, 3), torch.ones(2, 3, device="meta")), ValueError, "device of gate"),
        (lambda: ops.geglu(torch.ones(2, 4), approximate="erf"), ValueError, "approximate must be"),
        (lambda: ops.swiglu(torch.ones(2, 4).double(), backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
