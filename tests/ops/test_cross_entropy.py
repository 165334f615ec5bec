"""cross_entropy: every case on every backend and instruction set, against torch.nn.functional in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKENDS,
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
    sizes,
)

SIZES = [(5, 1), (5, 2), (64, 7), (0, 7), (1, 16), (5, 17), (17, 1000), (5, 2049), (3, 50257)]
REDUCTIONS = ["none", "mean", "sum"]
INF = float("inf")


def torch_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    weight = None if weight is None else weight.to(logits.dtype)
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if not z_loss:
        return F.cross_entropy(z, target, reduction=reduction, **options)
    kept = target != ignore_index
    row = kept.to(z.dtype) if weight is None else weight[target.where(kept, 0)] * kept
    loss = F.cross_entropy(z, target, reduction="none", **options) + z_loss * row * z.logsumexp(1).square()
    return loss if reduction == "none" else loss.sum() / (row.sum() if reduction == "mean" else 1)


def inputs(M: int, V: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    target = torch.randint(V, (M,))
    target[1::4] = -100
    return (torch.randn(M, V) * scale).to(dtype), target


def on_device(backend: str) -> bool:
    return backend.partition("-")[0] in ("triton", "cuda")


def compare(backend: str, logits: Tensor, target: Tensor, **options: Any) -> None:
    oracle, oracle_grads = differentiate(lambda x: torch_cross_entropy(x, target, **options), [logits.double()])
    eager, eager_grads = differentiate(lambda x: torch_cross_entropy(x, target, **options), [logits])
    with on(backend):
        actual, grads = differentiate(lambda x: ops.cross_entropy(x, target, **options), [logits])
    assert actual[0].dtype == torch.float32 and grads[0].dtype == logits.dtype
    assert_accurate("loss", actual[0], oracle[0], eager[0], FORWARD, ulps=4 if logits.dtype is torch.float32 else 64)
    assert_accurate("dlogits", grads[0], oracle_grads[0], eager_grads[0], BACKWARD)


@each_backend
@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    logits, target = inputs(*size, dtype)
    for reduction in REDUCTIONS if size[1] < 50_000 else ["mean"]:
        compare(backend, logits, target, reduction=reduction)


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [(6, 33), (5, 2500)], ids=str)
def test_every_combination_of_options(backend: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """The denominator under smoothing, weights and ignored rows together is pytorch's issue 69339."""
    logits, target = inputs(*size, dtype)
    target[0] = 2  # also a class that may be the ignored one
    weights = (None, torch.rand(size[1]).to(dtype))
    every = itertools.product(REDUCTIONS, weights, (0.0, 0.1), (0.0, 1e-2), (None, 5.0), (-100, 2))
    # Every fifth or eleventh: no factor of their number, so that each option meets each other one.
    few = list(every)[:: 5 if dtype is torch.float32 and size[1] == 33 else 11]
    for reduction, weight, smoothing, z_loss, softcap, ignored in few:
        options = {"weight": weight, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        labels = target if ignored == -100 else target.where(target != -100, 2)
        compare(backend, logits, labels, reduction=reduction, ignore_index=ignored, **options)


@each_backend
def test_label_in_every_lane(backend: str) -> None:
    logits = torch.randn(70, 70)
    compare(backend, logits, torch.arange(70))
    compare(backend, logits, torch.arange(70), reduction="none", label_smoothing=0.2)


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits(backend: str, dtype: torch.dtype, value: float) -> None:
    logits, target = inputs(6, 300, dtype)
    for reduction in REDUCTIONS:
        compare(backend, logits + value, target, reduction=reduction)
    spread = logits.clone()
    spread[:, ::7] = value
    compare(backend, spread, target, reduction="sum")


@each_backend
@each_dtype
def test_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    """Also a whole block, the first one among them, without any finite logit."""
    logits, target = inputs(6, 5000, dtype)
    logits[:, 10:4000] = -INF
    logits[2, :4500] = -INF
    target = torch.randint(4500, 5000, (6,))
    for reduction in REDUCTIONS:
        compare(backend, logits, target, reduction=reduction)
        with on(backend):
            _, (dlogits,) = differentiate(lambda x, r=reduction: ops.cross_entropy(x, target, reduction=r), [logits])
        assert (dlogits[logits == -INF] == 0).all()
    compare(backend, logits, target, softcap=30.0)
    with on(backend):
        assert ops.cross_entropy(logits, target, label_smoothing=0.1) == INF  # as torch
        assert ops.cross_entropy(torch.full((1, 40), -INF, dtype=dtype), torch.tensor([3])).isnan()
        assert ops.cross_entropy(torch.full((1, 40), float("nan"), dtype=dtype), torch.tensor([3])).isnan()


@each_backend
@each_dtype
def test_nearly_certain_rows(backend: str, dtype: torch.dtype) -> None:
    """softmax(z)[t] - 1 cancels where the row is certain; the kernels take it from the other classes instead."""
    logits, target = (0.1 * torch.randn(8, 100)).to(dtype), torch.arange(8) * 9
    logits[torch.arange(8), target] = torch.linspace(5, 20, 8).to(dtype)
    compare(backend, logits, target, reduction="sum")
    if backend == "reference":
        return
    for reduction in ("sum", "none"):
        one = [torch.ones(8 if reduction == "none" else ())]
        oracle, (want,) = differentiate(
            lambda x, r=reduction: F.cross_entropy(x, target, reduction=r), [logits.double()], one
        )
        with on(backend):
            loss, (dlogits,) = differentiate(
                lambda x, r=reduction: ops.cross_entropy(x, target, reduction=r), [logits], one
            )
        torch.testing.assert_close(loss[0].double(), oracle[0], rtol=1e-5, atol=0)
        own = torch.arange(8), target
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(dlogits[own].double(), want[own], rtol=3 * torch.finfo(dtype).eps + 1e-5, atol=tiny)


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_layouts(backend: str, dtype: torch.dtype, reduction: str) -> None:
    logits, target = inputs(8, 100, dtype)
    labels = torch.full((17,), -1)
    labels[1::2] = target
    with on(backend):
        expected = differentiate(lambda x: ops.cross_entropy(x, target, reduction=reduction), [logits])
        for name, view in layouts(logits):
            for t in (target, labels[1::2]):
                actual = differentiate(lambda x, t=t: ops.cross_entropy(x, t, reduction=reduction), [view])
                assert_same_values(backend, [*actual[0], *actual[1]], [*expected[0], *expected[1]], name)
        row = logits[:1].expand(8, 100)
        compare(backend, row, target, reduction=reduction)


@each_backend
def test_expanded_and_strided_upstream(backend: str) -> None:
    logits, target = inputs(10, 40, torch.float32)
    with on(backend):
        for grad in (torch.randn(()).expand(10), torch.randn(20)[::2]):
            function = lambda x: ops.cross_entropy(x, target, reduction="none")  # noqa: E731
            _, expected = differentiate(function, [logits], [grad.contiguous()])
            _, grads = differentiate(function, [logits], [grad])
            assert_same_values(backend, grads, expected)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@each_dtype
def test_large_output_goes_past_the_cache(backend: str, dtype: torch.dtype) -> None:
    """Above 32 MiB the gradient is stored past the cache, in whole lines wherever a row begins."""
    M, V = sizes((1 << 25) // 2 // dtype.itemsize // 501 * 2 + 6, 12), 501
    logits, target = inputs(M, V, dtype)
    with on(backend):
        for options in ({"reduction": "sum"}, {"reduction": "none"}):
            one = [torch.ones(M if options["reduction"] == "none" else ())]
            _, (large,) = differentiate(lambda x, o=options: ops.cross_entropy(x, target, **o), [logits], one)
            part = slice(M - sizes(301, 5), M)
            some = [one[0][part] if one[0].dim() else one[0]]
            _, (small,) = differentiate(
                lambda x, t=target[part], o=options: ops.cross_entropy(x, t, **o), [logits[part]], some
            )
            assert_same_values(backend, [large[part]], [small])


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average(backend: str, reduction: str) -> None:
    """No rows, or every label ignored: what torch gives, and gradient 0."""
    for logits, target in (
        (torch.randn(0, 5), torch.empty(0, dtype=torch.int64)),
        (torch.randn(2, 5), torch.full((2,), -100)),
    ):
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            want = F.cross_entropy(logits, target, **options)
            with on(backend):
                actual, (dlogits,) = differentiate(
                    lambda x, t=target, o=options: ops.cross_entropy(x, t, **o), [logits]
                )
            torch.testing.assert_close(actual[0], want, equal_nan=True)
            assert (dlogits == 0).all() and dlogits.shape == logits.shape


@each_backend
@each_dtype
def test_upstream_other_than_one(backend: str, dtype: torch.dtype) -> None:
    """Also float16 with a loss scale: made for an upstream gradient of 1, small elements would round to 0."""
    logits, target = inputs(64, 1000, dtype)
    scale = [torch.tensor(65536.0 if dtype is torch.float16 else 0.3)]
    _, oracle = differentiate(lambda x: F.cross_entropy(x, target), [logits.double()], scale)
    _, eager = differentiate(lambda x: F.cross_entropy(x.float(), target), [logits], scale)
    with on(backend):
        _, grads = differentiate(lambda x: ops.cross_entropy(x, target), [logits], scale)
    assert_accurate("dlogits", grads[0], oracle[0], eager[0], BACKWARD)


# --- shapes that choose other ways through the kernels ---------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("size", [(4, 1), (7, 2), (2, 50257), (2, 50304), (1, 128256), (1, 1 << 20)], ids=str)
def test_vocabularies(backend: str, size: tuple[int, int]) -> None:
    """Few rows are split over the GPU; the odd vocabularies put every row on another alignment."""
    logits, target = inputs(*size, torch.bfloat16)
    target[0] = size[1] - 1
    compare(backend, logits, target, reduction="sum", label_smoothing=0.1 if size[1] == 50257 else 0.0)


@each_backend
@each_dtype
def test_label_at_every_edge(backend: str, dtype: torch.dtype) -> None:
    """Rows longer than a tile, on every alignment: the label in the first and last tile, lane and unaligned column."""
    V = 4099
    labels = [0, 1, 6, 7, 8, 9, 2046, 2047, 2048, 2056, 4095, 4096, 4097, 4098]
    target = torch.tensor(labels)
    storage = torch.randn(len(labels) * (V + 2) + 3).to(dtype)
    for offset, stride in ((0, V), (3, V + 2)):
        view = storage.as_strided((len(labels), V), (stride, 1), offset)
        compare(backend, view, target, reduction="none")
        with on(backend):
            separate = differentiate(lambda x: ops.cross_entropy(x, target), [view], [torch.ones(())])
            owned = storage.clone().requires_grad_()
            rows = (owned * 1).as_strided((len(labels), V), (stride, 1), offset)
            ops.cross_entropy(rows, target, overwrite_logits=True).backward()
            assert_same_values(backend, [rows.detach()], separate[1], "in place")


@each_backend
def test_rows_apart(backend: str) -> None:
    """Row offsets in steps of a large stride, and a label per row read through a stride."""
    storage = torch.randn(6, 3, 2100)
    target = torch.randint(2100, (6, 2))
    compare(backend, storage[:, 1], target[:, 1], reduction="none")
    compare(backend, storage[:, 1, :40], target[:, 1] % 40)


@each_backend
def test_numbers_of_python_do_not_widen(backend: str) -> None:
    """The options are Python floats of 64 bits: outputs stay in their dtypes, and the same number in float32 is it."""
    logits, target = inputs(8, 2100, torch.bfloat16)
    exact = float(torch.tensor(0.1, dtype=torch.float32))
    with on(backend):
        one, other = (
            differentiate(lambda x, s=s: ops.cross_entropy(x, target, label_smoothing=s, z_loss=s), [logits])
            for s in (0.1, exact)
        )
    assert one[0][0].dtype == torch.float32 and one[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(one[0][0], other[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(one[1][0], other[1][0])


# --- gradients more than once ----------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_and_logits_used_elsewhere(backend: str, reduction: str) -> None:
    leaf, target = inputs(9, 50, torch.float32)
    grads = []
    for function, place in ((F.cross_entropy, "reference"), (ops.cross_entropy, backend)):
        x = leaf.clone().requires_grad_()
        with on(place):
            logits = x * 2
            loss = function(logits, target, reduction=reduction)
            total = loss.sum() + logits.square().mean()
            total.backward(retain_graph=True)
            total.backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@each_backend
def test_leaf_keeps_the_gradient_without_a_copy_that_others_share(backend: str) -> None:
    logits, target = inputs(9, 50, torch.float32)
    logits.requires_grad_()
    with on(backend):
        loss = ops.cross_entropy(logits, target)
        loss.backward(retain_graph=True)
        assert logits.grad is not None
        first = logits.grad.clone()
        logits.grad.fill_(7.0)  # must not reach the second backward
        logits.grad = None
        loss.backward()
    torch.testing.assert_close(logits.grad, first)


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_overwrite_logits(backend: str, dtype: torch.dtype, reduction: str, softcap: float | None) -> None:
    leaf, target = inputs(9, 2100, dtype)
    options: dict[str, Any] = {"reduction": reduction, "softcap": softcap, "label_smoothing": 0.1}
    with on(backend):
        expected = differentiate(lambda x: ops.cross_entropy(x * 1, target, **options), [leaf])
        held = []

        def overwriting(x: Tensor) -> Tensor:
            held.append(x * 1)
            return ops.cross_entropy(held[0], target, **options, overwrite_logits=True)

        actual = differentiate(overwriting, [leaf])
        assert_same_values(backend, [*actual[0], *actual[1]], [*expected[0], *expected[1]], "overwritten")
        assert torch.equal(held[0], actual[1][0]), "the gradient lies where the logits were"
        with torch.no_grad():
            before = leaf.clone()
            ops.cross_entropy(leaf, target, **options, overwrite_logits=True)
            assert torch.equal(leaf, before), "without a gradient there is nothing to write"


@each_backend
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_overwrite_logits_is_safe(backend: str, reduction: str) -> None:
    leaf, target = inputs(9, 50, torch.float32)
    leaf.requires_grad_()
    with on(backend):
        for mine in (leaf, leaf.view(9, 50), leaf[:, :40], (leaf[:1] * 1).expand(9, 50)):
            with pytest.raises(RuntimeError, match="overwrite_logits"):
                ops.cross_entropy(mine, target.clamp(max=39), overwrite_logits=True)
        loss = ops.cross_entropy(leaf * 1, target, reduction=reduction, overwrite_logits=True).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="twice with overwrite_logits"):
            loss.backward()
        if reduction == "mean":  # square() saved what is gone
            logits = leaf * 1
            other = logits.square().sum()
            total = ops.cross_entropy(logits, target, overwrite_logits=True) + other
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
        expected = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0]
        # Views, one of which no kernel can walk: the gradient passes through them and lies there all the same.
        for view in ((leaf * 1).view(3, 3, 50).view(9, 50), (leaf.t() * 1).t()):
            (dlogits,) = torch.autograd.grad(ops.cross_entropy(view, target, overwrite_logits=True), leaf)
            torch.testing.assert_close(dlogits, expected)
            torch.testing.assert_close(view.detach(), expected)


@each_backend
def test_a_wrong_label_changes_nothing(backend: str) -> None:
    leaf, target = inputs(9, 50, torch.float32)
    target[8] = 50
    logits = leaf.clone().requires_grad_() * 1
    with on(backend):
        if on_device(backend):  # which must not wait for the GPU to see it
            assert ops.cross_entropy(logits, target, overwrite_logits=True).isnan()
            return
        with pytest.raises(IndexError, match="Target 50 is out of bounds"):
            ops.cross_entropy(logits, target, overwrite_logits=True)
    assert torch.equal(logits, leaf)


# --- the pattern around the kernel -----------------------------------------------------------------------------------


@each_backend
def test_same_bits_again_and_for_any_thread_count(backend: str) -> None:
    logits, target = inputs(sizes(300, 40), 700, torch.float32)
    for reduction in ("mean", "none"):
        function = lambda x, r=reduction: ops.cross_entropy(x, target, reduction=r)  # noqa: E731
        with on(backend):
            torch.set_num_threads(2)
            first, again = differentiate(function, [logits]), differentiate(function, [logits])
            torch.set_num_threads(1)
            alone = differentiate(function, [logits])
        for other in (again, *([alone] if backend != "reference" else [])):
            assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


@each_backend
@pytest.mark.parametrize("overwrite", [False, True])
def test_torch_compile_fullgraph(backend: str, overwrite: bool) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"overwrite_logits": overwrite, "softcap": 9.0, "z_loss": 1e-3}
    with on(backend):
        for reduction in ("mean", "none"):

            def function(x: Tensor, t: Tensor, r: str = reduction) -> Tensor:
                return ops.cross_entropy(x * 1.5, t, reduction=r, **options) * 2

            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for size in [(6, 40), (9, 33)]:
                logits, target = inputs(*size, torch.float32)
                expected = differentiate(lambda x, t=target: function(x, t), [logits])
                actual = differentiate(lambda x, f=compiled, t=target: f(x, t), [logits])
                torch.testing.assert_close([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    logits, target = inputs(5, 12, torch.float32)
    name = backend.partition("-")[0]
    with on(backend):
        library = torch.ops.fastlm
        for reduction in ("none", "mean"):
            options = (torch.rand(12), -100, reduction, 0.1, 1e-3, None)
            for needs in (False, True):
                torch.library.opcheck(library.cross_entropy_forward, (logits, target, *options, needs, name))
            loss, stats, _ = library.cross_entropy_forward(logits, target, *options, False, name)
            torch.library.opcheck(library.cross_entropy_backward, (loss, logits, target, *options, stats, name))


def test_gradcheck() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 5, -100, 0])
    weight = torch.rand(6, dtype=torch.float64)
    for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": 0.01, "softcap": 3.0}
        assert torch.autograd.gradcheck(lambda x, o=options: ops.cross_entropy(x, target, weight=weight, **o), [logits])


@each_backend
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_double_backward_raises(backend: str, reduction: str) -> None:
    logits, target = inputs(3, 6, torch.float32)
    logits.requires_grad_()
    with on(backend):
        loss = ops.cross_entropy(logits, target, reduction=reduction).sum()
        (dlogits,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dlogits.square().sum() + logits.sum()).backward()


@each_backend
@each_dtype
def test_without_gradients(backend: str, dtype: torch.dtype) -> None:
    logits, target = inputs(7, 3000, dtype)
    with on(backend):
        for reduction in REDUCTIONS:
            with torch.no_grad():
                quiet = ops.cross_entropy(logits, target, reduction=reduction)
            plain = ops.cross_entropy(logits, target, reduction=reduction)
            loud = ops.cross_entropy(logits.clone().requires_grad_(), target, reduction=reduction)
            assert torch.equal(quiet, loud) and torch.equal(quiet, plain) and not plain.requires_grad


X, T = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.cross_entropy(X.long(), T), TypeError, "logits must be floating point"),
        (lambda: ops.cross_entropy(X[0], T), ValueError, r"logits must be \(M, V\)"),
        (lambda: ops.cross_entropy(X, T[:1]), ValueError, r"target must be \(2,\)"),
        (lambda: ops.cross_entropy(X, T.int()), TypeError, "torch.int64"),
        (lambda: ops.cross_entropy(X, X), TypeError, "class indices"),
        (lambda: ops.cross_entropy(X, [0, 1]), TypeError, "target must be a Tensor, got list"),
        (lambda: ops.cross_entropy(X, T.to("meta")), ValueError, "device of logits"),
        (lambda: ops.cross_entropy(X[:, :0], T), ValueError, "at least one class"),
        (lambda: ops.cross_entropy(X, T, weight=torch.ones(4)), ValueError, r"weight must be \(3,\)"),
        (lambda: ops.cross_entropy(X, T, weight=torch.ones(3, requires_grad=True)), ValueError, "gradient"),
        (lambda: ops.cross_entropy(X, T, reduction="max"), ValueError, "none, mean, sum, got 'max'"),
        (lambda: ops.cross_entropy(X, T, label_smoothing=1.5), ValueError, "between 0 and 1"),
        (lambda: ops.cross_entropy(X, T, label_smoothing=float("nan")), ValueError, "between 0 and 1"),
        (lambda: ops.cross_entropy(X, T, z_loss=-1.0), ValueError, "z_loss"),
        (lambda: ops.cross_entropy(X, T, softcap=0.0), ValueError, "softcap must be above 0"),
        (lambda: ops.cross_entropy(X, T, backend="gpu"), ValueError, "backend must be one of"),
        (lambda: ops.cross_entropy(X.double(), T, backend="cpu"), fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@each_backend
@pytest.mark.parametrize("label", [3, -1, 1 << 40, -(1 << 62)])
def test_label_out_of_range(backend: str, label: int) -> None:
    logits, target = torch.ones(2, 3), torch.tensor([0, label])
    with on(backend):
        assert ops.cross_entropy(logits, target, ignore_index=label).isfinite()
        for reduction in REDUCTIONS:
            if on_device(backend):  # defined, and without a host sync: NaN in that row and in what is summed over it
                loss, (dlogits,) = differentiate(
                    lambda x, r=reduction: ops.cross_entropy(x, target, reduction=r), [logits]
                )
                assert loss[0].isnan().tolist() == ([False, True] if reduction == "none" else True)
                assert dlogits[1].isnan().all() and bool(dlogits[0].isnan().all()) == (reduction == "mean")
                continue
            with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
                ops.cross_entropy(logits, target, reduction=reduction)
