"""linear: every case on every backend and instruction set, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.linear import OP
from tests.ops.harness import (
    BACKWARD,
    FORWARD,
    assert_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_backend,
    each_dtype,
    layouts,
    on,
    refuses,
)

NAMES = ("dx", "dweight", "dbias")
# M, K, N: one, one off a tile of 32, several blocks of 384 and parts of 256 rows, an odd rest of each.
SIZES = [(1, 1, 1), (3, 5, 2), (31, 33, 17), (33, 31, 65), (64, 96, 32), (300, 400, 70), (513, 20, 797)]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def inputs(M: int, K: int, N: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    weight = torch.randn(N, K) * max(K, 1) ** -0.5
    return [torch.randn(M, K).to(dtype), weight.to(dtype), torch.randn(N).to(dtype) if bias else None]


def autocast(function: Any) -> Any:
    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*tensors)

    return run


def compare(backend: str, tensors: list[Tensor | None], ours: Any = ops.linear, eager: Any = F.linear) -> None:
    wide = [None if t is None else t.double() for t in tensors]
    oracle, oracle_grads = differentiate(F.linear, wide)
    peer, peer_grads = differentiate(eager, tensors)
    with on(backend):
        actual, grads = differentiate(ours, tensors)
    assert actual[0].dtype == peer[0].dtype and actual[0].is_contiguous()
    assert_accurate("y", actual[0], oracle[0], peer[0], FORWARD)
    present = [(n, t) for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for (name, tensor), grad, want, theirs in zip(present, grads, oracle_grads, peer_grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert_accurate(name, grad, want, theirs, BACKWARD)


@each_backend
@each_dtype
@each_size
def test_matches_float64(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    compare(backend, inputs(*size, dtype))


@each_backend
@each_dtype
def test_without_bias_and_in_three_dimensions(backend: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(6 * 7, 40, 24, dtype, bias=False)
    compare(backend, [x, weight, None])
    compare(backend, [x.view(6, 7, 40), weight, None])
    compare(backend, [x[0], weight, torch.randn(24).to(dtype)])


@each_backend
@each_size
def test_autocast(backend: str, size: tuple[int, int, int]) -> None:
    """From float32, and with x lowered before: what is float32 gets a float32 gradient."""
    tensors = inputs(*size, torch.float32)
    compare(backend, tensors, autocast(ops.linear), autocast(F.linear))
    tensors[0] = tensors[0].bfloat16()
    compare(backend, tensors, autocast(ops.linear), autocast(F.linear))


@pytest.mark.parametrize("backend", ["cpu-generic", "cpu-amx"])
def test_a_float32_weight_keeps_its_sums(backend: str) -> None:
    """Under autocast torch rounds the gradients of weight and bias to bfloat16; the kernel does not."""
    from fastlm import native

    if backend.partition("-")[2] not in native.isas():
        pytest.skip("this processor has no AMX")
    x, weight, bias = inputs(500, 64, 96, torch.float32)
    x, dy = x.bfloat16(), torch.randn(500, 96).bfloat16()
    with on(backend):
        _, (_, dweight, dbias) = differentiate(autocast(ops.linear), [x, weight, bias], [dy])
    want = dy.double().t() @ x.double(), dy.double().sum(0)
    for grad, exact in zip((dweight, dbias), want, strict=True):
        assert (grad - exact).abs().max() < 1e-5 * exact.abs().max()


@each_backend
@each_dtype
def test_empty(backend: str, dtype: torch.dtype) -> None:
    for m, k, n in [(0, 3, 4), (4, 0, 3), (4, 3, 0)]:
        with on(backend):
            y, (dx, dweight, dbias) = differentiate(ops.linear, inputs(m, k, n, dtype))
        assert y[0].shape == (m, n) and dx.shape == (m, k) and dweight.shape == (n, k) and dbias.shape == (n,)
        assert not dx.count_nonzero() and not dweight.count_nonzero()
        assert m or not dbias.count_nonzero()


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(72, 40, 48, dtype)
    dy = torch.randn(72, 48).to(dtype)
    with on(backend):
        expected = differentiate(ops.linear, [x, weight, bias], [dy])
        for name, view in layouts(x):
            y, grads = differentiate(ops.linear, [view, weight, bias], [dy])
            torch.testing.assert_close(y, expected[0], msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(grads[0], expected[1][0])
            assert_same_values(backend if dtype is not torch.float32 else "reference", grads[1:], expected[1][1:], name)
        for name, view in layouts(weight):
            y, grads = differentiate(ops.linear, [x, view, bias], [dy])
            torch.testing.assert_close([*y, *grads], [*expected[0], *expected[1]], msg=lambda m, n=name: f"{n}: {m}")
        for grad in (torch.randn(72, 1).to(dtype).expand(72, 48), torch.randn(48).to(dtype).expand(72, 48),
                     torch.randn(()).to(dtype).expand(72, 48), dy.t().contiguous().t()):  # fmt: skip
            _, want = differentiate(ops.linear, [x, weight, bias], [grad.contiguous()])
            _, grads = differentiate(ops.linear, [x, weight, bias], [grad])
            torch.testing.assert_close(grads, want)


@each_backend
@each_dtype
def test_gradient_of_a_transposed_parameter_lies_as_the_parameter(backend: str, dtype: torch.dtype) -> None:
    """transformers' Conv1D keeps its weight as (K, N)."""
    for size in SIZES:
        x, weight, bias = inputs(*size, dtype)
        compare(backend, [x, weight.t().contiguous().t(), bias])
    with on(backend):
        parameter = weight.t().contiguous().requires_grad_()
        ops.linear(x, parameter.t(), bias).sum().backward()
    assert parameter.grad is not None and parameter.grad.is_contiguous()


@each_backend
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(backend: str, needs: tuple[bool, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(40, 36, 20, dtype)
        with on(backend):
            _, full = differentiate(ops.linear, tensors)
            leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
            y = ops.linear(*leaves)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
            y.backward(dy)
        for leaf, grad, need in zip(leaves, full, needs, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, grad)


@each_backend
@each_dtype
def test_same_bits_again_and_for_any_thread_count(backend: str, dtype: torch.dtype) -> None:
    """Large enough for several threads. The products are torch's, whose sums depend on them; the kernel's do not."""
    tensors = inputs(700, 200, 500, dtype)
    with on(backend):
        first = differentiate(ops.linear, tensors)
        again = differentiate(ops.linear, tensors)
        torch.set_num_threads(1)
        alone = differentiate(ops.linear, tensors)
    assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])
    if backend != "reference" and dtype is not torch.float32:
        assert_same_bits(first[1][1:], alone[1][1:])


@each_backend
def test_infinities_stay_in_their_rows_and_columns(backend: str) -> None:
    x, weight, _ = inputs(70, 40, 50, torch.bfloat16, bias=False)
    dy = torch.randn(70, 50).bfloat16()
    x[69, 39], dy[68, 49] = float("inf"), float("nan")
    with on(backend):
        _, (_, dweight) = differentiate(ops.linear, [x, weight], [dy])
    finite = dweight.isfinite()
    assert finite[:49, :39].all() and not finite[:, 39].any() and not finite[49].any()


@each_backend
def test_values_stand_for_the_weight(backend: str) -> None:
    x, weight, bias = inputs(20, 16, 24, torch.float32)
    values = (2 * weight).bfloat16()
    with on(backend):
        y, (dx, dweight, _) = differentiate(
            autocast(lambda x, w, b: ops.linear(x, w, b, values=values)), [x, weight, bias]
        )
        want, (want_dx, want_dweight, _) = differentiate(autocast(ops.linear), [x, 2 * weight, bias])
    assert_same_bits([*y, dx, dweight], [*want, want_dx, want_dweight])
    assert dweight.dtype is torch.float32


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda *t: ops.linear(*t) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            tensors = [torch.randn(shape), torch.randn(24, 32), torch.randn(24)]
            for wrap in (lambda f: f, autocast):
                expected = differentiate(wrap(lambda *t: ops.linear(*t) * 2), tensors)
                actual = differentiate(wrap(compiled), tensors)
                assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    x, weight, bias = inputs(2 * 3, 8, 12, torch.bfloat16)
    x, dy = x.view(2, 3, 8), torch.randn(2, 3, 12).bfloat16()
    with on(backend):
        torch.library.opcheck(torch.ops.fastlm.linear_forward, (x, weight, bias, name))
        for needs in [(True, True, True), (False, True, False), (True, False, True)]:
            for wide in (True, False):
                for w in (weight, weight.t().contiguous().t()):
                    torch.library.opcheck(torch.ops.fastlm.linear_backward, (dy, x, w, wide, *needs, name))


def test_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in inputs(6, 5, 4, torch.float32) if t is not None]
    assert torch.autograd.gradcheck(ops.linear, tensors)


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x, weight, _ = inputs(3, 6, 5, torch.float32, bias=False)
    with on(backend):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(ops.linear(x, weight), x, torch.randn(3, 5), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@each_backend
def test_float64(backend: str) -> None:
    tensors = [t.double() for t in inputs(5, 4, 3, torch.float32) if t is not None]
    with on(backend):
        if refuses(OP, backend, tensors[0]):
            with pytest.raises(fastlm.UnsupportedError, match="float64"):
                ops.linear(*tensors)
        else:
            torch.testing.assert_close(ops.linear(*tensors), F.linear(*tensors))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.linear(torch.ones(2, dtype=torch.int64), torch.ones(3, 2)), TypeError, "x must be floating"),
        (lambda: ops.linear(torch.ones(2), [1.0]), TypeError, "weight must be a Tensor"),
        (lambda: ops.linear(torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"\(\.\.\., K\) and weight \(N, K\)"),
        (lambda: ops.linear(torch.ones(()), torch.ones(3, 2)), ValueError, r"got \(\) and \(3, 2\)"),
        (lambda: ops.linear(torch.ones(2), torch.ones(3, 2, device="meta")), ValueError, "weight must be on"),
        (lambda: ops.linear(torch.ones(2), torch.ones(3, 2), torch.ones(2)), ValueError, r"bias must be \(3,\)"),
        (
            lambda: ops.linear(torch.ones(2), torch.ones(3, 2), values=torch.ones(3, 2).bfloat16()),
            ValueError,
            "values must be .* of torch.float32",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
