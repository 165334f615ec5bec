"""rms_norm and add_rms_norm: every case on every backend and instruction set, against float64."""

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

SHAPES = [(1, 1), (65, 2), (2, 7), (0, 5), (3, 15), (65, 16), (3, 5, 17), (2, 33), (1, 100), (2, 768), (65, 1000),
          (33, 1025), (1200, 33), (7,)]  # fmt: skip
NAMES = ("dx", "dweight")
EPS = torch.finfo(torch.float32).eps  # torch's default for every dtype but float64


def torch_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None = EPS, offset: float = 0.0) -> Tensor:
    weight = None if weight is None else weight.to(x.dtype) + offset
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) + mean).to(dtype), torch.randn(shape[-1]).to(dtype)


def compare(x: Tensor, weight: Tensor | None, backend: str, offset: float = 0.0) -> None:
    tensors = [x, weight]
    wide = [None if t is None else t.double() for t in tensors]
    oracle, oracle_grads = differentiate(lambda x, w: torch_rms_norm(x, w, offset=offset), wide)
    eager, eager_grads = differentiate(lambda x, w: torch_rms_norm(x, w, offset=offset), tensors)
    with on(backend):
        actual, grads = differentiate(lambda x, w: ops.rms_norm(x, w, offset=offset), tensors)
    assert actual[0].dtype == x.dtype and actual[0].is_contiguous()
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD)
    assert_all_accurate(NAMES[: len(grads)], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(*inputs(shape, dtype), backend)


@each_backend
@each_dtype
def test_without_weight_and_with_offset(backend: str, dtype: torch.dtype) -> None:
    x, weight = inputs((9, 100), dtype)
    compare(x, None, backend)
    compare(x, None, backend, offset=1.0)
    compare(x, weight, backend, offset=1.0)
    compare(x, torch.zeros_like(weight), backend)


@each_backend
@each_dtype
def test_large_values_equal_and_zero_rows(backend: str, dtype: torch.dtype) -> None:
    x, weight = inputs((8, 129), dtype, mean=1e4)
    x[3], x[4] = 7.0, 0.0
    weight[5] = 0.0
    compare(x, weight, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_default_eps_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 1e-3).to(dtype)  # squares near eps, so that another eps shows
    actual, expected = ops.rms_norm(x, torch.ones(8, dtype=dtype)), F.rms_norm(x, (8,))
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)


@each_backend
@each_dtype
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x, weight = inputs((6, 5, 48), dtype)
    with on(backend):
        expected = differentiate(ops.rms_norm, [x, weight])
        for name, view in layouts(x):
            outputs, grads = differentiate(ops.rms_norm, [view, weight])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)


@each_backend
def test_expanded_and_strided_upstream(backend: str) -> None:
    x, weight = inputs((10, 40), torch.float32)
    column = torch.randn(10, 1)
    with on(backend):
        for grad in (column.expand(10, 40), torch.randn(()).expand(10, 40), torch.randn(40, 10).t()):
            _, expected = differentiate(ops.rms_norm, [x, weight], [grad.contiguous()])
            _, grads = differentiate(ops.rms_norm, [x, weight], [grad])
            assert_same_values(backend, grads, expected)


@each_backend
def test_upstream_gradient_shared_with_a_residual(backend: str) -> None:
    """y + x hands one gradient to both: the kernel must not write into it."""
    x, weight = inputs((10, 40), torch.float32)
    upstream = torch.randn(10, 40)
    kept = upstream.clone()
    with on(backend):
        _, grads = differentiate(lambda x, w: ops.rms_norm(x, w) + x, [x, weight], [upstream])
        _, alone = differentiate(ops.rms_norm, [x, weight], [upstream])
    assert torch.equal(upstream, kept)
    torch.testing.assert_close(grads[0], alone[0] + kept)


@each_backend
def test_mixed_dtypes(backend: str) -> None:
    """bf16 activations, float32 weight: gradients come back in each one's dtype."""
    x, weight = torch.randn(12, 64).bfloat16(), torch.randn(64)
    with on(backend):
        outputs, grads = differentiate(ops.rms_norm, [x, weight])
    oracle, oracle_grads = differentiate(torch_rms_norm, [x.double(), weight.double()])
    eager, eager_grads = differentiate(torch_rms_norm, [x, weight.bfloat16()])
    assert outputs[0].dtype == torch.bfloat16 and [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    assert_all_accurate(["y"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(NAMES, grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
def test_many_rows_keep_the_weight_gradient_exact(backend: str) -> None:
    """Partial sums are float32: the error of dweight does not grow with the number of rows, as a bf16 sum's does."""
    x, weight = inputs((20_000, 8), torch.bfloat16)
    with on(backend):
        _, grads = differentiate(ops.rms_norm, [x, weight.float()])
    _, oracle = differentiate(torch_rms_norm, [x.double(), weight.double()])
    assert (grads[1] - oracle[1]).abs().max() <= 2e-5 * oracle[1].abs().max() + 2e-4


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
    oracle, oracle_grads = differentiate(torch_rms_norm, [t.double() for t in tensors])
    with on(backend):
        outputs, grads = differentiate(ops.rms_norm, tensors)
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
        expected = differentiate(ops.rms_norm, tensors)
        actual = differentiate(ops.rms_norm, [view, *tensors[1:]])
    assert_same_values(backend, [*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
@pytest.mark.parametrize("shape", [(700, 200), (3000, 40)], ids=str)
def test_same_bits_again_and_for_any_thread_count(backend: str, shape: tuple[int, ...]) -> None:
    tensors = inputs(shape, torch.float32)
    with on(backend):
        first = differentiate(ops.rms_norm, tensors)
        again = differentiate(ops.rms_norm, tensors)
        torch.set_num_threads(1)
        alone = differentiate(ops.rms_norm, tensors)
        torch.set_num_threads(3)
        three = differentiate(ops.rms_norm, tensors)
    for other in (again, *([alone, three] if backend != "reference" else [])):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


# --- with a residual ------------------------------------------------------------------------------------------------


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return torch_rms_norm(h, weight), h


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(0, 4), (3, 17), (2, 3, 256)], ids=str)
def test_add_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = inputs(shape, dtype)
    tensors = [x, torch.randn(shape).to(dtype), weight]
    oracle, oracle_grads = differentiate(torch_add_rms_norm, [t.double() for t in tensors])
    eager, eager_grads = differentiate(torch_add_rms_norm, tensors)
    with on(backend):
        outputs, grads = differentiate(ops.add_rms_norm, tensors)
    assert_all_accurate(["y", "h"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(["dx", "dresidual", "dweight"], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only h"])
def test_add_with_one_output_used(backend: str, used: int) -> None:
    x, weight = inputs((4, 32), torch.float32)
    leaves = [t.requires_grad_() for t in (x, torch.randn(4, 32), weight)]
    wanted = leaves[: 3 if used == 0 else 2]
    with on(backend):
        actual = torch.autograd.grad(ops.add_rms_norm(*leaves)[used].square().sum(), wanted)
    expected = torch.autograd.grad(torch_add_rms_norm(*leaves)[used].square().sum(), wanted)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_backend
def test_add_of_strided_residuals(backend: str) -> None:
    x, weight = inputs((6, 40), torch.bfloat16)
    residual = torch.randn(6, 40).bfloat16()
    with on(backend):
        expected = differentiate(ops.add_rms_norm, [x, residual, weight])
        for name, view in layouts(residual):
            outputs, grads = differentiate(ops.add_rms_norm, [x, view, weight])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)


# --- the pattern around the kernel ----------------------------------------------------------------------------------


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x, w: ops.rms_norm(x, w) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            tensors = inputs(shape, torch.float32)
            expected = differentiate(lambda *t: ops.rms_norm(*t) * 2, tensors)
            actual = differentiate(compiled, tensors)
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    name, seed = backend.partition("-")[0], torch.tensor([17])
    x, weight = inputs((4, 12), torch.float32)
    with on(backend):
        library = torch.ops.fastlm
        torch.library.opcheck(library.rms_norm_forward, (x, x.clone(), weight, 1e-5, 0.0, seed, 0.2, name))
        y, _, rstd = library.rms_norm_forward(x, None, weight, 1e-5, 0.0, None, 0.0, name)
        for drop in ((None, 0.0), (seed, 0.2)):
            torch.library.opcheck(library.rms_norm_backward, (y, x, weight, rstd, y.clone(), 1.0, *drop, name))


def test_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in inputs((3, 6), torch.float32)]
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5, offset=1.0), tensors)
    assert torch.autograd.gradcheck(ops.add_rms_norm, [torch.randn(3, 6).double().requires_grad_(), *tensors])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x, weight = (t.requires_grad_() for t in inputs((3, 6), torch.float32))
    with on(backend):
        (dx,) = torch.autograd.grad(ops.rms_norm(x, weight), x, torch.randn(3, 6), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@each_backend
def test_no_grad_and_frozen_inputs(backend: str) -> None:
    x, weight = inputs((5, 24), torch.float32)
    with on(backend):
        with torch.no_grad():
            quiet = ops.rms_norm(x, weight)
        loud = ops.rms_norm(x, weight.requires_grad_())
        assert torch.equal(quiet, loud)
        loud.sum().backward()
    assert weight.grad is not None and x.grad is None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.rms_norm(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x must be floating point"),
        (lambda: ops.rms_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight must be \(3,\)"),
        (lambda: ops.add_rms_norm(torch.ones(2, 3), torch.ones(3)), ValueError, "residual must be"),
        (lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(3, device="meta")), ValueError, "device of x"),
        (lambda: ops.rms_norm(torch.ones(2, 3), backend="gpu"), ValueError, "backend must be one of"),
        (lambda: ops.rms_norm(torch.ones(2, 3).double(), backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
