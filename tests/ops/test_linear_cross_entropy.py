"""linear_cross_entropy: every case on every backend and instruction set, against the unfused head in float64."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import ops
from fastlm.kernels import _platform
from fastlm.native import linear_cross_entropy as chunked
from fastlm.ops.linear_cross_entropy import OP
from fastlm.reference.linear_cross_entropy import FILTER_TILE
from tests.ops.harness import (
    BACKENDS,
    BACKWARD,
    DTYPES,
    FORWARD,
    assert_accurate,
    assert_same_bits,
    differentiate,
    each_backend,
    each_dtype,
    layouts,
    on,
    refuses,
    sizes,
)
from tests.ops.test_cross_entropy import REDUCTIONS, torch_cross_entropy

triton = None if _platform.missing() else importlib.import_module("fastlm.kernels.linear_cross_entropy")
NAMES = ("dhidden", "dweight", "dbias")
KERNELS = [b for b in BACKENDS if b != "reference"]
one_kernel = pytest.mark.parametrize("backend", ["reference", *KERNELS[-1:]])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows at a time; 64 classes of the half types on the CPU."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "LEAST_CLASSES", 1)
    if triton is not None:
        monkeypatch.setattr(triton, "CHUNK_BYTES", 1)
        monkeypatch.setattr(triton, "ROW_STEP", 16)


def unfused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, **options: Any
) -> Tensor:
    dtype = hidden.dtype
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch_cross_entropy(logits, target, weight=class_weight, **options)


def inputs(M: int, C: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.randint(V, (M,))
    target[1::4] = -100
    return torch.randn(M, C).to(dtype), torch.randn(V, C).to(dtype) * 0.3, torch.randn(V).to(dtype), target


def compare(
    backend: str,
    tensors: list[Tensor | None],
    target: Tensor,
    class_weight: Tensor | None = None,
    implementation: str | None = None,
    **options: Any,
) -> None:
    wide = [None if t is None else t.double() for t in tensors]
    oracle, oracle_grads = differentiate(lambda *t: unfused(*t, target, class_weight, **options), wide)
    eager, eager_grads = differentiate(lambda *t: unfused(*t, target, class_weight, **options), tensors)
    with on(backend):
        actual, grads = differentiate(
            lambda h, w, b: ops.linear_cross_entropy(
                h, w, target, b, class_weight=class_weight, implementation=implementation, **options
            ),
            tensors,
        )
    half = tensors[0] is not None and tensors[0].dtype is not torch.float32
    assert_accurate("loss", actual[0], oracle[0], eager[0], FORWARD, ulps=4096 if half else 8)
    present = [(n, t) for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for (name, tensor), grad, want, peer in zip(present, grads, oracle_grads, eager_grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert_accurate(name, grad, want, peer, BACKWARD, ulps=8)


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [(1, 3, 1), (0, 4, 5), (5, 8, 17), (50, 24, 300)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(
    small_chunks: None, backend: str, dtype: torch.dtype, size: tuple[int, int, int], with_bias: bool
) -> None:
    """With bias too: its loss was negative in another package whose tests left the bias out."""
    hidden, weight, bias, target = inputs(*size, dtype)
    for reduction in REDUCTIONS:
        compare(backend, [hidden, weight, bias if with_bias else None], target, reduction=reduction)


@each_backend
def test_every_combination_of_options(small_chunks: None, backend: str) -> None:
    hidden, weight, bias, target = inputs(40, 8, 33, torch.float32)
    every = itertools.product(REDUCTIONS, (None, torch.rand(33)), (0.0, 0.1), (0.0, 1e-2), (None, 5.0), (-100, 2))
    for reduction, class_weight, smoothing, z_loss, softcap, ignored in list(every)[::5]:
        labels = target if ignored == -100 else target.where(target != -100, 2)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "ignore_index": ignored}
        compare(backend, [hidden, weight, bias], labels, class_weight, reduction=reduction, **options)


@each_backend
def test_options_over_slices_of_classes(small_chunks: None, backend: str) -> None:
    """Of the half types on the CPU: a whole slice without a finite logit first, the last one shorter than the rest."""
    hidden, weight, bias, target = inputs(40, 8, 150, torch.bfloat16)
    target = target.where(target == -100, target.clamp(min=65))
    shut = bias.clone()
    shut[:64] = -float("inf")
    for reduction in REDUCTIONS:
        compare(backend, [hidden, weight, shut], target, reduction=reduction)
    target[0] = 2
    every = itertools.product(REDUCTIONS, (None, torch.rand(150)), (0.0, 0.1), (0.0, 1e-2), (None, 5.0), (-100, 2))
    for reduction, class_weight, smoothing, z_loss, softcap, ignored in list(every)[::11]:
        labels = target if ignored == -100 else target.where(target != -100, 2)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "ignore_index": ignored}
        compare(backend, [hidden, weight, bias], labels, class_weight, reduction=reduction, **options)


@pytest.mark.parametrize("backend", KERNELS[-1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_does_not_grow_worse_with_chunks(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    """Chunks of rows in float32 and on the GPU; on the CPU, slices of classes for the half types."""
    M, V = sizes(2048, 512), 200
    walks_classes = triton is None and dtype is not torch.float32
    hidden, weight, _, target = inputs(M, 16, V, dtype)
    hidden = hidden + 1  # gradients that do not cancel, where rounded sums show
    _, oracle = differentiate(lambda h, w: unfused(h, w, None, target, None), [hidden.double(), weight.double()])
    errors = []
    with on(backend):
        for rows in (M, 16):
            monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows * V)
            monkeypatch.setattr(chunked, "LEAST_CLASSES", V if rows == M else 1)
            monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 1)
            assert len(list(chunked.chunks(M, V))) == M // rows
            assert len(chunked.slices(M, V)) == (1 if rows == M else 4)
            assert not walks_classes or chunked.two_passes(hidden, weight) == (rows != M)
            if triton is not None:
                monkeypatch.setattr(triton, "CHUNK_BYTES", rows * V * dtype.itemsize)
                monkeypatch.setattr(triton, "ROW_STEP", 16)
                assert len(list(triton.chunks(M, V, dtype.itemsize))) == M // rows
            # A float32 weight, so that its gradient is not rounded once more.
            _, grads = differentiate(lambda h, w: ops.linear_cross_entropy(h, w, target), [hidden, weight.float()])
            errors.append([float((g - o).abs().max() / o.abs().max()) for g, o in zip(grads, oracle, strict=True)])
    for one, many in zip(*errors, strict=True):
        assert many <= 2 * one + 1e-6, errors


@pytest.mark.parametrize(("M", "V"), [(0, 10), (1, 10), (2048, 50304), (2047, 50257), (5, 1 << 26), (4096, 65)])
def test_chunks_cover_the_rows(M: int, V: int) -> None:
    parts = list(chunked.chunks(M, V))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(M))
    assert all((part.stop - part.start) * V <= max(chunked.CHUNK_ELEMENTS, 16 * V) for part in parts)
    parts = chunked.slices(M, V)
    assert parts[0].start == 0 and parts[-1].stop == V
    assert all(left.stop == right.start for left, right in itertools.pairwise(parts))
    assert all(0 < (p.stop - p.start) <= max(chunked.LEAST_CLASSES, chunked.SLICE_ELEMENTS // max(M, 1)) for p in parts)


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    M, C, V = 512, 8, 3000
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 64 * V)
    monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 64 * V)
    monkeypatch.setattr(chunked, "LEAST_CLASSES", 1)
    hidden, weight, bias, target = inputs(M, C, V, dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with Largest() as largest:
        torch.autograd.grad(unfused(*leaves, target, None), leaves)
    assert largest.bytes >= M * V * dtype.itemsize
    # Called directly: a dispatch mode does not see into a library op.
    arguments = (*(t.detach() for t in leaves), target, None, -100, "none", 0.1, 0.0, None, "chunked", None)
    with Largest() as largest:
        loss, stats, *_ = chunked.forward(*arguments, [True, True, True])
        chunked.backward(loss, *arguments, stats, [True, True, True])
    chunk = 64 * V * 4 if dtype is torch.float32 else M * 384 * 2  # 64 rows; 375 classes, in whole 64s
    assert chunk <= largest.bytes <= chunk + 512, largest.bytes  # 512: the canaries


@one_kernel
def test_no_gradient_that_nobody_wants(backend: str) -> None:
    hidden, weight, bias, target = inputs(20, 8, 30, torch.float32)
    with on(backend):
        expected = differentiate(
            lambda h, w, b: ops.linear_cross_entropy(h, w, target, b), [hidden, weight, bias], [torch.ones(())]
        )
        for wanted in itertools.product((False, True), repeat=3):
            tensors = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
            loss = ops.linear_cross_entropy(tensors[0], tensors[1], target, tensors[2])
            if any(wanted):
                loss.backward()
            assert torch.equal(loss, expected[0][0]) or backend == "reference"
            for tensor, grad, want in zip(tensors, expected[1], wanted, strict=True):
                assert (tensor.grad is not None) == want
                if tensor.grad is not None:
                    torch.testing.assert_close(tensor.grad, grad)
    arguments = (hidden, weight, bias, target, None, -100, "mean", 0.0, 0.0, None, "chunked", None)
    results = torch.ops.fastlm.linear_cross_entropy_forward(*arguments, [True, False, False], backend.partition("-")[0])
    assert [t.numel() > 0 for t in results[2:]] == [True, False, False]


@one_kernel
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_and_upstream_other_than_one(small_chunks: None, backend: str, reduction: str) -> None:
    hidden, weight, bias, target = inputs(40, 8, 30, torch.float32)
    results = []
    for function in (
        lambda h, w, b: unfused(h, w, b, target, None, reduction=reduction),
        lambda h, w, b: ops.linear_cross_entropy(h, w, target, b, reduction=reduction),
    ):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        with on(backend):
            total = 0.3 * function(*leaves).sum() + leaves[0].square().sum()
            total.backward(retain_graph=True)
            total.backward()
        results.append([t.grad for t in leaves])
    for actual, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


@one_kernel
def test_expanded_upstream_and_layouts(small_chunks: None, backend: str) -> None:
    hidden, weight, bias, target = inputs(40, 8, 30, torch.float32)
    function = lambda h, w, b: ops.linear_cross_entropy(h, w, target, b, reduction="none")  # noqa: E731
    with on(backend):
        grad = torch.randn(()).expand(40)
        expected = differentiate(function, [hidden, weight, bias], [grad.contiguous()])
        for (_, h), (_, w) in zip(layouts(hidden), layouts(weight), strict=True):
            actual = differentiate(function, [h, w, bias], [grad])
            torch.testing.assert_close([*actual[0], *actual[1]], [*expected[0], *expected[1]], rtol=1e-4, atol=1e-5)


@one_kernel
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(backend: str, reduction: str) -> None:
    """Products in bfloat16; the loss is float32, and so are the gradients of float32 weights, unrounded on the way."""
    hidden, weight, bias, target = inputs(64, 32, 100, torch.float32)
    oracle, oracle_grads = differentiate(
        lambda h, w, b: unfused(h, w, b, target, None, reduction=reduction),
        [t.bfloat16().double() for t in (hidden, weight, bias)],
    )

    def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            with torch.autocast(h.device.type, torch.bfloat16):
                return function(h, w, b)

        return run

    eager, eager_grads = differentiate(
        autocast(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target, reduction=reduction)),
        [hidden, weight, bias],
    )
    with on(backend):
        actual, grads = differentiate(
            autocast(lambda h, w, b: ops.linear_cross_entropy(h, w, target, b, reduction=reduction)),
            [hidden, weight, bias],
        )
    assert actual[0].dtype == torch.float32 and [g.dtype for g in grads] == [torch.float32] * 3
    assert_accurate("loss", actual[0], oracle[0], eager[0], FORWARD)
    for name, grad, want, peer in zip(NAMES, grads, oracle_grads, eager_grads, strict=True):
        assert_accurate(name, grad, want, peer, BACKWARD)
    if backend != "reference":
        assert not torch.equal(grads[1], grads[1].bfloat16().float()) or reduction == "none"


@one_kernel
def test_same_bits_again(backend: str) -> None:
    hidden, weight, bias, target = inputs(100, 16, 200, torch.float32)
    with on(backend):
        first, again = (
            differentiate(lambda h, w, b: ops.linear_cross_entropy(h, w, target, b), [hidden, weight, bias])
            for _ in range(2)
        )
    assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])


@one_kernel
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        for reduction in ("mean", "none"):

            def function(h: Tensor, w: Tensor, b: Tensor, t: Tensor, r: str = reduction) -> Tensor:
                return ops.linear_cross_entropy(h * 2, w, t, b, reduction=r) * 3

            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for M in (6, 9):
                *tensors, target = inputs(M, 8, 20, torch.float32)
                expected = differentiate(lambda *x, t=target: function(*x, t), tensors)
                actual = differentiate(lambda *x, f=compiled, t=target: f(*x, t), tensors)
                torch.testing.assert_close([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@one_kernel
def test_opcheck(backend: str) -> None:
    hidden, weight, bias, target = inputs(5, 4, 12, torch.float32)
    name = backend.partition("-")[0]
    library = torch.ops.fastlm
    for reduction, needs in (("none", [False] * 3), ("mean", [True] * 3), ("sum", [True, False, True])):
        arguments = (hidden, weight, bias, target, None, -100, reduction, 0.1, 1e-3, None, "chunked", None)
        torch.library.opcheck(library.linear_cross_entropy_forward, (*arguments, needs, name))
        loss, stats, *_ = library.linear_cross_entropy_forward(*arguments, needs, name)
        torch.library.opcheck(library.linear_cross_entropy_backward, (loss, *arguments, stats, [True] * 3, name))


def test_gradcheck() -> None:
    hidden, weight, bias, target = inputs(5, 3, 6, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: ops.linear_cross_entropy(h, w, target, b, **o), leaves
        )


@one_kernel
def test_double_backward_raises(backend: str) -> None:
    hidden, weight, _, target = inputs(5, 3, 6, torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with on(backend):
        loss = ops.linear_cross_entropy(*leaves, target)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (grads[0].square().sum() + grads[1].sum() + hidden.sum()).backward()


# --- the fused form --------------------------------------------------------------------------------------------------


def fused(backend: str, filtered: bool = False) -> bool:
    """Whether the backend has the fused form; if not, it must say so."""
    features = {"fused", "gradient_filter"} if filtered else {"fused"}
    if not refuses(OP, backend, torch.empty(0), features):
        return True
    hidden, weight, _, target = inputs(2, 3, 4, torch.float32)
    with on(backend), pytest.raises(fastlm.UnsupportedError, match="it has no fused"):
        option = {"gradient_filter": 0.1} if filtered else {"implementation": "fused"}
        ops.linear_cross_entropy(hidden, weight, target, **option)
    return False


@one_kernel
@each_dtype
@pytest.mark.parametrize("size", [(1, 3, 1), (0, 4, 5), (5, 8, 2), (70, 24, 300), (130, 72, 257)], ids=str)
def test_fused(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Sizes on either side of a tile, in rows, classes and channels."""
    if not fused(backend):
        return
    hidden, weight, bias, target = inputs(*size, dtype)
    for reduction, b in (("none", bias), ("mean", None), ("sum", bias)):
        compare(backend, [hidden, weight, b], target, reduction=reduction, implementation="fused")


@one_kernel
def test_fused_with_every_option(backend: str) -> None:
    if not fused(backend):
        return
    hidden, weight, bias, target = inputs(40, 8, 33, torch.float32)
    every = itertools.product(REDUCTIONS, (None, torch.rand(33)), (0.0, 0.1), (0.0, 1e-2), (None, 5.0), (-100, 2))
    for reduction, class_weight, smoothing, z_loss, softcap, ignored in list(every)[::5]:
        labels = target if ignored == -100 else target.where(target != -100, 2)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "ignore_index": ignored}
        options |= {"reduction": reduction, "implementation": "fused"}
        compare(backend, [hidden, weight, bias], labels, class_weight, **options)


@one_kernel
def test_fused_label_in_every_lane_and_nearly_certain(backend: str) -> None:
    if not fused(backend):
        return
    hidden, weight = 4 * torch.eye(130), 4 * torch.eye(130)
    compare(backend, [hidden, weight, None], torch.arange(130), implementation="fused")
    compare(backend, [hidden, weight, torch.randn(130)], torch.arange(130), implementation="fused", reduction="none")


@one_kernel
def test_fused_labels_that_do_not_count(backend: str) -> None:
    """None left: NaN and gradients 0, as torch. Out of range: NaN without a host sync where that would need one."""
    if not fused(backend):
        return
    hidden, weight, bias, _ = inputs(3, 4, 5, torch.float32)
    ignored = torch.full((3,), -100)
    with on(backend):
        for reduction, want in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
            loss, grads = differentiate(
                lambda h, w, b, r=reduction: ops.linear_cross_entropy(
                    h, w, ignored, b, reduction=r, implementation="fused"
                ),
                [hidden, weight, bias],
            )
            torch.testing.assert_close(loss[0], torch.full_like(loss[0], want), equal_nan=True)
            assert all((g == 0).all() for g in grads)
        if backend != "triton":
            return
        for wrong in (5, -1, 1 << 40):
            target = torch.tensor([0, wrong, 1])
            for implementation in ("chunked", "fused"):
                loss = ops.linear_cross_entropy(hidden, weight, target, reduction="none", implementation=implementation)
                assert loss.isnan().tolist() == [False, True, False]
                assert ops.linear_cross_entropy(hidden, weight, target, implementation=implementation).isnan()


@one_kernel
def test_fused_layouts_and_same_bits(backend: str) -> None:
    if not fused(backend):
        return
    hidden, weight, bias, target = inputs(40, 24, 30, torch.float32)
    function = lambda h, w, b: ops.linear_cross_entropy(  # noqa: E731
        h, w, target, b, reduction="none", implementation="fused"
    )
    with on(backend):
        grad = torch.randn(()).expand(40)
        expected = differentiate(function, [hidden, weight, bias], [grad.contiguous()])
        for (_, h), (_, w) in zip(layouts(hidden), layouts(weight), strict=True):
            actual = differentiate(function, [h, w, bias], [grad])
            if backend == "reference":
                torch.testing.assert_close(actual, expected)
            else:
                assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@one_kernel
def test_fused_under_autocast_without_unwanted_gradients(backend: str) -> None:
    if not fused(backend):
        return
    hidden, weight, bias, target = inputs(20, 8, 30, torch.float32)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    with on(backend), torch.autocast(hidden.device.type, torch.bfloat16):
        ops.linear_cross_entropy(hidden, w, target, b, implementation="fused").backward()
    rounded = hidden.bfloat16().double()
    _, want = differentiate(
        lambda w, b: unfused(rounded, w, b, target, None),
        [weight.bfloat16().double(), bias.bfloat16().double()],
        [torch.ones(())],
    )
    assert w.grad is not None and b.grad is not None and w.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad.double(), want[0], rtol=0.02, atol=2e-4)
    torch.testing.assert_close(b.grad.double(), want[1], rtol=0.02, atol=2e-4)


@one_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_filter(backend: str, dtype: torch.dtype) -> None:
    """Whole tiles, and only those in which every |softmax - onehot| is below the bound, lose their gradient."""
    if not fused(backend, filtered=True):
        return
    tile = FILTER_TILE[dtype.itemsize]
    M, C, V = tile + 5, 16, 3 * tile
    hidden, weight = torch.randn(M, C).to(dtype), torch.zeros(V, C, dtype=dtype)
    weight[:tile] = torch.randn(tile, C).to(dtype)
    bias = torch.zeros(V).to(dtype)
    bias[tile:] = -12.0  # far less likely than any of the first tile's classes
    target = torch.randint(tile, (M,))
    target[-1], target[-2] = 2 * tile + 1, -100  # the last rows need the third tile, nobody the second
    bound = 1e-4

    def loss(h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
        return ops.linear_cross_entropy(h, w, target, b, label_smoothing=0.1, reduction="sum", **options)

    inputs = [hidden, weight, bias]
    with on(backend):
        exact = differentiate(lambda *t: loss(*t, implementation="fused"), inputs, [torch.ones(())])
        filtered = differentiate(lambda *t: loss(*t, gradient_filter=bound), inputs, [torch.ones(())])
    assert torch.equal(exact[0][0], filtered[0][0]), "the loss is exact"
    (_, dw, db), (_, dw_exact, _) = filtered[1], exact[1]
    assert (dw[tile : 2 * tile] == 0).all() and (db[tile : 2 * tile] == 0).all() and (dw_exact[tile:] != 0).any()
    assert torch.equal(dw[:tile], dw_exact[:tile])
    with on("reference"):
        _, want = differentiate(lambda *t: loss(*t, gradient_filter=bound), inputs, [torch.ones(())])
    for name, got, expected in zip(NAMES, filtered[1], want, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            got.float(), expected.float(), rtol=4 * eps, atol=4 * eps * float(expected.abs().max()), msg=name
        )


H, W, T = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.linear_cross_entropy(H.long(), W, T), TypeError, "hidden must be floating point"),
        (lambda: ops.linear_cross_entropy(H[0], W, T), ValueError, r"hidden must be \(M, C\)"),
        (lambda: ops.linear_cross_entropy(H, W[:, :2], T), ValueError, r"weight must be \(V, 3\)"),
        (lambda: ops.linear_cross_entropy(H, W, T, torch.ones(4)), ValueError, r"bias must be \(5,\)"),
        (lambda: ops.linear_cross_entropy(H, W, T[:1]), ValueError, r"target must be \(2,\)"),
        (
            lambda: ops.linear_cross_entropy(H, W, T, class_weight=torch.ones(3)),
            ValueError,
            r"class_weight must be \(5,\)",
        ),
        (lambda: ops.linear_cross_entropy(H, W.to("meta"), T), ValueError, "device of hidden"),
        (lambda: ops.linear_cross_entropy(H, W, T, reduction="max"), ValueError, "reduction"),
        (
            lambda: ops.linear_cross_entropy(H, W, T, implementation="tiled"),
            ValueError,
            "'chunked' or 'fused', got 'tiled'",
        ),
        (
            lambda: ops.linear_cross_entropy(H, W, T, implementation="chunked", gradient_filter=0.1),
            ValueError,
            "gradient_filter needs implementation='fused'",
        ),
        (lambda: ops.linear_cross_entropy(H, W, T, gradient_filter=0.0), ValueError, "between 0 and 1, got 0.0"),
        (lambda: ops.linear_cross_entropy(H, W, T + 5), IndexError, "Target 5 is out of bounds"),
        (lambda: ops.linear_cross_entropy(H.double(), W, T, backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
