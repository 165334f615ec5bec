"""layer_norm and add_layer_norm: every case on every backend and instruction set, against float64."""

from __future__ import annotations

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
    far_apart,
    layouts,
    on,
)

SHAPES = [(1, 1), (2, 7), (0, 5), (65, 16), (3, 5, 17), (2, 768), (33, 1025), (1200, 33), (7,)]
NAMES = ("dx", "dweight", "dbias")


def torch_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    n = shape[-1]
    return (torch.randn(shape) + mean).to(dtype), torch.randn(n).to(dtype), torch.randn(n).to(dtype)


def compare(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str) -> None:
    tensors = [x, weight, bias]
    wide = [None if t is None else t.double() for t in tensors]
    oracle, oracle_grads = differentiate(torch_layer_norm, wide)
    eager, eager_grads = differentiate(torch_layer_norm, tensors)
    with on(backend):
        actual, grads = differentiate(ops.layer_norm, tensors)
    assert actual[0].dtype == x.dtype and actual[0].is_contiguous()
    names = [n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD)
    assert_all_accurate(names, grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(*inputs(shape, dtype), backend)


@each_backend
@pytest.mark.parametrize("parameters", ["neither", "weight", "bias"])
def test_optional_parameters(backend: str, parameters: str) -> None:
    for shape, dtype in (((9, 100), torch.float32), ((2, 8200), torch.bfloat16)):
        x, weight, bias = inputs(shape, dtype)
        compare(x, weight if parameters == "weight" else None, bias if parameters == "bias" else None, backend)


@each_backend
@each_dtype
def test_large_mean_and_equal_rows(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs((8, 129), dtype, mean=1000.0)
    x[3] = 7.0  # variance zero
    weight[5] = 0.0
    compare(x, weight, bias, backend)


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs((6, 5, 48), dtype)
    with on(backend):
        expected = differentiate(ops.layer_norm, [x, weight, bias])
        for name, view in layouts(x):
            outputs, grads = differentiate(ops.layer_norm, [view, weight, bias])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)


@each_backend
def test_expanded_and_strided_upstream(backend: str) -> None:
    x, weight, bias = inputs((10, 40), torch.float32)
    column = torch.randn(10, 1)
    with on(backend):
        for grad in (column.expand(10, 40), torch.randn(()).expand(10, 40), torch.randn(40, 10).t()):
            _, expected = differentiate(ops.layer_norm, [x, weight, bias], [grad.contiguous()])
            _, grads = differentiate(ops.layer_norm, [x, weight, bias], [grad])
            assert_same_values(backend, grads, expected)


@each_backend
def test_mixed_dtypes(backend: str) -> None:
    """bf16 activations, float32 parameters: gradients come back in each one's dtype."""
    x = torch.randn(12, 64).bfloat16()
    weight, bias = torch.randn(64), torch.randn(64)
    with on(backend):
        outputs, grads = differentiate(ops.layer_norm, [x, weight, bias])
    oracle, oracle_grads = differentiate(torch_layer_norm, [x.double(), weight.double(), bias.double()])
    eager, eager_grads = differentiate(torch_layer_norm, [x, weight.bfloat16(), bias.bfloat16()])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert_all_accurate(["y"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(NAMES, grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
def test_many_rows_keep_the_weight_gradient_exact(backend: str) -> None:
    """Partial sums are float32: the error of dweight does not grow with the number of rows, as a bf16 sum's does."""
    x, weight, bias = inputs((20_000, 8), torch.bfloat16)
    with on(backend):
        _, grads = differentiate(ops.layer_norm, [x, weight.float(), bias.float()])
    _, oracle = differentiate(torch_layer_norm, [x.double(), weight.double(), bias.double()])
    for grad, want in zip(grads[1:], oracle[1:], strict=True):
        assert (grad - want).abs().max() <= 2e-5 * want.abs().max() + 2e-4


@each_backend
@pytest.mark.parametrize("rows", [511, 512, 513])
def test_rows_that_fill_the_tiles_of_a_kernel_and_one_off(backend: str, rows: int) -> None:
    compare(*inputs((rows, 32), torch.bfloat16), backend)


@each_backend
@pytest.mark.parametrize("n", [8192, 8193, 12288])
def test_long_rows(backend: str, n: int) -> None:
    """What a kernel holds in registers, and in pieces; float32 plainly: the rule on leaning errors needs many rows."""
    compare(*inputs((2, n), torch.bfloat16, mean=3.0), backend)
    tensors = inputs((2, n), torch.float32, mean=3.0)
    oracle, oracle_grads = differentiate(torch_layer_norm, [t.double() for t in tensors])
    with on(backend):
        outputs, grads = differentiate(ops.layer_norm, tensors)
    for actual, want in zip((*outputs, *grads), (*oracle, *oracle_grads), strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=2e-5)


@each_backend
def test_rows_far_apart(backend: str) -> None:
    """Two rows 2^31 elements apart: offsets do not fit 32 bits. The memory between them is never touched."""
    distance, n = 2**31 + 16, 24
    memory = far_apart(distance + n)
    tensors = inputs((2, n), torch.bfloat16)
    view = memory.as_strided((2, n), (distance, 1)).copy_(tensors[0])
    with on(backend):
        expected = differentiate(ops.layer_norm, tensors)
        actual = differentiate(ops.layer_norm, [view, *tensors[1:]])
    assert_same_values(backend, [*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_same_bits_again_and_for_any_thread_count(backend: str) -> None:
    tensors = inputs((700, 200), torch.float32)
    with on(backend):
        first = differentiate(ops.layer_norm, tensors)
        again = differentiate(ops.layer_norm, tensors)
        torch.set_num_threads(1)
        alone = differentiate(ops.layer_norm, tensors)
    for other in (again, *([alone] if backend != "reference" else [])):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


# --- with a residual -------------------------------------------------------------------------------------------------


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return torch_layer_norm(h, weight, bias), h


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(0, 4), (3, 17), (2, 3, 256)], ids=str)
def test_add_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(shape, dtype)
    tensors = [x, torch.randn(shape).to(dtype), weight, bias]
    oracle, oracle_grads = differentiate(torch_add_layer_norm, [t.double() for t in tensors])
    eager, eager_grads = differentiate(torch_add_layer_norm, tensors)
    with on(backend):
        outputs, grads = differentiate(ops.add_layer_norm, tensors)
    assert_all_accurate(["y", "h"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(["dx", "dresidual", "dweight", "dbias"], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only h"])
def test_add_with_one_output_used(backend: str, used: int) -> None:
    x, weight, bias = inputs((4, 32), torch.float32)
    residual = torch.randn(4, 32)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    with on(backend):
        actual = torch.autograd.grad(ops.add_layer_norm(*leaves)[used].square().sum(), leaves[: 4 if used == 0 else 2])
    expected = torch.autograd.grad(torch_add_layer_norm(*leaves)[used].square().sum(), leaves[: 4 if used == 0 else 2])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the pattern around the kernel -----------------------------------------------------------------------------------


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x, w, b: ops.layer_norm(x, w, b) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            tensors = inputs(shape, torch.float32)
            expected = differentiate(lambda *t: ops.layer_norm(*t) * 2, tensors)
            actual = differentiate(compiled, tensors)
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name, seed = backend.partition("-")[0], torch.tensor([17])
    x, weight, bias = inputs((4, 12), torch.float32)
    with on(backend):
        library = torch.ops.fastlm
        torch.library.opcheck(library.layer_norm_forward, (x, x.clone(), weight, bias, 1e-5, seed, 0.2, name))
        y, _, mean, rstd = library.layer_norm_forward(x, None, weight, bias, 1e-5, None, 0.0, name)
        for drop in ((None, 0.0), (seed, 0.2)):
            args = (y, x, weight, mean, rstd, y.clone(), True, *drop, name)
            torch.library.opcheck(library.layer_norm_backward, args)


def test_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in inputs((3, 6), torch.float32)]
    assert torch.autograd.gradcheck(ops.layer_norm, tensors)
    assert torch.autograd.gradcheck(ops.add_layer_norm, [torch.randn(3, 6).double().requires_grad_(), *tensors])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs((3, 6), torch.float32))
    with on(backend):
        (dx,) = torch.autograd.grad(ops.layer_norm(x, weight, bias), x, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@each_backend
def test_no_grad_and_frozen_inputs(backend: str) -> None:
    x, weight, bias = inputs((5, 24), torch.float32)
    with on(backend):
        with torch.no_grad():
            quiet = ops.layer_norm(x, weight, bias)
        loud = ops.layer_norm(x, weight.requires_grad_(), bias)
        assert torch.equal(quiet, loud)
        loud.sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.layer_norm(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x must be floating point"),
        (lambda: ops.layer_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.layer_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight must be \(3,\)"),
        (lambda: ops.layer_norm(torch.ones(2, 3), None, torch.ones(2, 3)), ValueError, r"bias must be \(3,\)"),
        (lambda: ops.add_layer_norm(torch.ones(2, 3), torch.ones(3)), ValueError, "residual must be"),
        (lambda: ops.layer_norm(torch.ones(2, 3), torch.ones(3, device="meta")), ValueError, "device of x"),
        (lambda: ops.layer_norm(torch.ones(2, 3), backend="gpu"), ValueError, "backend must be one of"),
        (lambda: ops.layer_norm(torch.ones(2, 3).double(), backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_half_precision_dtype_converts_exactly(backend: str, dtype: torch.dtype) -> None:
    """h = x + residual goes through the kernels' own conversions: all 65536 bit patterns, and sums that must round."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).view(256, 256)
    others = patterns.flatten()[torch.randperm(65536)].view(256, 256)
    with on(backend), torch.no_grad():
        for residual in (torch.zeros_like(patterns), others):
            _, h = ops.add_layer_norm(patterns, residual)
            expected = patterns + residual
            assert torch.equal(h.isnan(), expected.isnan())
            assert torch.equal(h[~h.isnan()], expected[~h.isnan()])
