"""softmax and its logarithm: every case on every backend, against float64."""

from __future__ import annotations

import pytest
import torch

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKENDS,
    BACKWARD,
    FORWARD,
    assert_all_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_dtype,
    layouts,
    on,
)

each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.startswith("cpu")])
both = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
INF = float("inf")
SHAPES = [
    (1,), (1, 1), (0, 3), (3, 0), (5, 2), (3, 3, 17), (33, 64), (200, 5), (3, 1000), (2, 2048), (3, 2049), (1, 16385),
    (2, 33000),
]  # fmt: skip


def compare(x: torch.Tensor, log: bool, backend: str) -> None:
    torch_function = torch.log_softmax if log else torch.softmax
    oracle, oracle_grads = differentiate(lambda x: torch_function(x, -1), [x.double()])
    eager, eager_grads = differentiate(lambda x: torch_function(x, -1), [x])
    with on(backend):
        actual, grads = differentiate(lambda x: ops.softmax(x, log=log), [x])
    assert actual[0].dtype == grads[0].dtype == x.dtype and actual[0].is_contiguous()
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD)
    assert_all_accurate(["dx"], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@each_dtype
@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, log: bool, shape: tuple[int, ...]) -> None:
    compare((3 * torch.randn(shape)).to(dtype), log, backend)


@each_backend
@each_dtype
@both
@pytest.mark.parametrize("n", [40, 33000])
def test_large_means_and_magnitudes(backend: str, dtype: torch.dtype, log: bool, n: int) -> None:
    x = torch.randn(4, n)
    x[0] += 1000
    x[1] -= 1000
    x[2] *= 50
    x[3] = 7
    compare(x.to(dtype), log, backend)


@each_backend
@both
@pytest.mark.parametrize("n", [40, 33000])
def test_infinities_and_nan_give_what_torch_gives(backend: str, log: bool, n: int) -> None:
    """Classes that cannot be, a row of them, all but one, the first half of a row, +inf, NaN, float32's ends."""
    x = torch.randn(8, n)
    x[0, ::3] = -INF
    x[1] = -INF
    x[2, :-1] = -INF
    x[3, : n // 2] = -INF
    x[4, 5] = INF
    x[5, 7] = float("nan")
    x[6], x[7] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    torch_function = torch.log_softmax if log else torch.softmax
    with on(backend):
        y = ops.softmax(x, log=log)
    torch.testing.assert_close(y, torch_function(x, -1), equal_nan=True)
    masked = x[:1]
    _, (oracle_grad,) = differentiate(lambda x: torch_function(x, -1), [masked.double()])
    with on(backend):
        _, (grad,) = differentiate(lambda x: ops.softmax(x, log=log), [masked])
    torch.testing.assert_close(grad, oracle_grad.float())


@each_backend
@each_dtype
@both
def test_layouts_and_expanded_upstream(backend: str, dtype: torch.dtype, log: bool) -> None:
    x = torch.randn(6, 5, 48).to(dtype)
    with on(backend):
        expected = differentiate(lambda x: ops.softmax(x, log=log), [x])
        for name, view in layouts(x):
            outputs, grads = differentiate(lambda x: ops.softmax(x, log=log), [view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        for grad in (
            torch.randn(6, 1, 1).expand(6, 5, 48),
            torch.randn(48).expand(6, 5, 48),
            torch.randn(48, 5, 6).permute(2, 1, 0),
        ):
            _, wanted = differentiate(lambda x: ops.softmax(x, log=log), [x], [grad.contiguous()])
            _, grads = differentiate(lambda x: ops.softmax(x, log=log), [x], [grad])
            assert_same_values(backend, grads, wanted)


@each_backend
@both
def test_same_bits_again(backend: str, log: bool) -> None:
    for shape in ((100, 201), (1, 40000)):
        x = torch.randn(shape)
        with on(backend):
            first = differentiate(lambda x: ops.softmax(x, log=log), [x])
            again = differentiate(lambda x: ops.softmax(x, log=log), [x])
        assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])


@each_backend
@both
def test_torch_compile_fullgraph(backend: str, log: bool) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x: ops.softmax(x, log=log) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            x = torch.randn(shape)
            expected = differentiate(lambda x: ops.softmax(x, log=log) * 2, [x])
            actual = differentiate(compiled, [x])
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    x = torch.randn(4, 12)
    with on(backend):
        torch.library.opcheck(torch.ops.fastlm.softmax_forward, (x, True, name))
        torch.library.opcheck(torch.ops.fastlm.softmax_backward, (torch.randn(4, 12), x.softmax(-1), False, name))


@both
def test_gradcheck(log: bool) -> None:
    x = torch.randn(3, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.softmax(x, log=log), [x])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(3, 6).requires_grad_()
    with on(backend):
        (dx,) = torch.autograd.grad(ops.softmax(x), x, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.softmax(torch.ones(2, dtype=torch.int64)), TypeError, "x must be floating point"),
        (lambda: ops.softmax(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.softmax([1.0]), TypeError, "x must be a Tensor"),
        (lambda: ops.softmax(torch.ones(2), backend="cpu"), fastlm.UnsupportedError, "no backend 'cpu'"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
