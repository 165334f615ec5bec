"""kl_div: every case on every backend, against float64 and torch.nn.functional.kl_div."""

from __future__ import annotations

from functools import partial

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
    assert_all_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_dtype,
    layouts,
    on,
)

each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.startswith("cpu")])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
INF = float("inf")
SHAPES = [(1, 1), (0, 7), (5, 2), (9,), (2, 3, 33), (70, 65), (3, 1000), (2, 4096), (3, 4097), (2, 13000)]


def formula(logits: Tensor, target: Tensor, reverse: bool, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Losses of the rows by torch's own functions, in float32 or float64."""
    q, p = (
        x.to(torch.float64 if logits.dtype is torch.float64 else torch.float32).div(temperature).log_softmax(-1)
        for x in (logits, target)
    )
    loss = F.kl_div(*((p, q) if reverse else (q, p)), reduction="none", log_target=True).sum(-1)
    return loss if mask is None else torch.where(mask, loss, 0)


def reduced(loss: Tensor, reduction: str, mask: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return loss
    count = loss.numel() if mask is None else mask.sum()
    return loss.sum() if reduction == "sum" else loss.sum() / count


def compare(
    logits: Tensor,
    target: Tensor,
    backend: str,
    reverse: bool,
    temperature: float = 1.0,
    reduction: str = "none",
    mask: Tensor | None = None,
) -> None:
    def eager_formula(logits: Tensor, target: Tensor) -> Tensor:
        return reduced(formula(logits, target, reverse, temperature, mask), reduction, mask)

    oracle, (want,) = differentiate(lambda x: eager_formula(x, target.double()), [logits.double()])
    eager, (eager_grad,) = differentiate(lambda x: eager_formula(x, target), [logits])
    with on(backend):
        actual, (grad,) = differentiate(
            lambda x: ops.kl_div(x, target, temperature=temperature, reduction=reduction, reverse=reverse, mask=mask),
            [logits],
        )
    assert actual[0].dtype is torch.float32 and grad.dtype == logits.dtype and grad.is_contiguous()
    assert_all_accurate(["loss"], actual, oracle, eager, FORWARD)
    assert_all_accurate(["dlogits"], [grad], [want], [eager_grad], BACKWARD)


@each_backend
@each_dtype
@directions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, reverse: bool, shape: tuple[int, ...]) -> None:
    compare(torch.randn(shape).to(dtype), (2 * torch.randn(shape)).to(dtype), backend, reverse)


@each_backend
@directions
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_temperatures_and_masks(backend: str, reverse: bool, reduction: str, masked: bool) -> None:
    logits, target = torch.randn(4, 5, 40), torch.randn(4, 5, 40)
    mask = torch.rand(4, 5) < 0.6 if masked else None
    for temperature in (1.0, 0.5, 4.0):
        compare(logits, target, backend, reverse, temperature, reduction, mask)


@each_backend
@directions
@pytest.mark.parametrize("v", [40, 9000])
def test_large_means_and_magnitudes(backend: str, reverse: bool, v: int) -> None:
    """A shift of a row costs no digits; nor does a student that is nearly the teacher."""
    logits, target = torch.randn(5, v), torch.randn(5, v)
    logits[0] += 1000
    target[1] -= 1000
    logits[2] *= 3 if reverse else 30  # in reverse a certain student's gradient is a difference of near equals
    target[3] = logits[3] + 500
    target[4] = logits[4] + 1e-3 * torch.randn(v)
    compare(logits, target, backend, reverse)


@each_backend
@directions
@pytest.mark.parametrize("v", [40, 9000])
def test_classes_that_cannot_be(backend: str, reverse: bool, v: int) -> None:
    """0 log 0 is 0; what one side excludes and the other weighs is infinite; a row of nothing is NaN."""
    logits, target = torch.randn(5, v), torch.randn(5, v)
    gone = torch.arange(v) % 3 == 0
    gone[: v // 2] = True
    logits[:2, gone] = -INF
    target[:2, gone] = -INF
    (logits if reverse else target)[2, gone] = -INF  # the side that weighs gives it nothing
    (target if reverse else logits)[3, gone] = -INF
    target[4] = -INF
    kept = ~gone
    with on(backend):
        loss, (grad,) = differentiate(lambda x: ops.kl_div(x, target, reduction="none", reverse=reverse), [logits])
    want, (want_grad,) = differentiate(
        lambda x: formula(x, target[:2, kept].double(), reverse, 1.0), [logits[:2, kept].double()], None
    )
    torch.testing.assert_close(loss[0][:2], want[0].float())
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(5, generator=generator, device="cpu").bfloat16().float().to(grad.device)
    first = torch.randn(2, generator=torch.Generator().manual_seed(1), device="cpu").bfloat16().to(grad.device)
    torch.testing.assert_close(
        (grad[:2] / scale[:2, None])[:, kept], (want_grad / first[:, None]).float(), atol=1e-6, rtol=1e-4
    )
    assert not grad[:2, gone].any()
    assert loss[0][2].isfinite() and loss[0][3] == INF and loss[0][4].isnan()
    assert grad[2].isfinite().all()


@each_backend
@directions
def test_masked_rows_count_for_nothing(backend: str, reverse: bool) -> None:
    logits, target = torch.randn(4, 20), torch.randn(4, 20)
    logits[1], target[2] = float("nan"), -INF
    mask = torch.tensor([True, False, False, True])
    with on(backend):
        loss, (grad,) = differentiate(lambda x: ops.kl_div(x, target, reverse=reverse, mask=mask), [logits])
        kept = ops.kl_div(logits[mask], target[mask], reverse=reverse)
        none, (nothing,) = differentiate(
            lambda x: ops.kl_div(x, target, reverse=reverse, mask=torch.zeros_like(mask)), [logits]
        )
    torch.testing.assert_close(loss[0], kept)
    assert grad[mask].any() and not grad[~mask].any()
    assert none[0].isnan() and not nothing.any()


@each_backend
@directions
def test_equal_logits_lose_nothing(backend: str, reverse: bool) -> None:
    x = 5 * torch.randn(3, 5000)
    with on(backend):
        loss, (grad,) = differentiate(lambda y: ops.kl_div(y, x, reverse=reverse), [x])
    assert loss[0].abs() < 1e-6 and grad.abs().max() < 1e-8


@each_backend
@directions
def test_layouts_mixed_dtypes_and_expanded_upstream(backend: str, reverse: bool) -> None:
    logits, target = torch.randn(6, 5, 48), torch.randn(6, 5, 48).bfloat16()
    loss = partial(ops.kl_div, reduction="none", reverse=reverse)
    with on(backend):
        expected = differentiate(lambda x: loss(x, target), [logits])
        wide = differentiate(lambda x: loss(x, target.float()), [logits])
        assert_same_bits([*wide[0], *wide[1]], [*expected[0], *expected[1]])
        for name, view in layouts(logits):
            outputs, grads = differentiate(lambda x: loss(x, target), [view])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        for name, view in layouts(target):
            outputs, grads = differentiate(lambda x, view=view: loss(x, view), [logits])
            assert_same_values(backend, [*outputs, *grads], [*expected[0], *expected[1]], name)
        for grad in (torch.randn(()).expand(6, 5), torch.randn(6, 1).expand(6, 5), torch.randn(5, 6).t()):
            _, wanted = differentiate(lambda x: loss(x, target), [logits], [grad.contiguous()])
            _, grads = differentiate(lambda x: loss(x, target), [logits], [grad])
            assert_same_values(backend, grads, wanted)


@each_backend
@directions
def test_same_bits_again(backend: str, reverse: bool) -> None:
    for shape in ((100, 201), (2, 9000)):
        logits, target = torch.randn(shape), torch.randn(shape)
        with on(backend):
            first = differentiate(lambda x, t=target: ops.kl_div(x, t, reverse=reverse), [logits])
            again = differentiate(lambda x, t=target: ops.kl_div(x, t, reverse=reverse), [logits])
        assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda x, t: ops.kl_div(x, t) * 2, fullgraph=True, backend="aot_eager")
        for shape in [(4, 32), (2, 3, 32)]:
            x, target = torch.randn(shape), torch.randn(shape)
            expected = differentiate(lambda x, t=target: ops.kl_div(x, t) * 2, [x])
            actual = differentiate(lambda x, t=target: compiled(x, t), [x])
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@each_backend
def test_opcheck(backend: str) -> None:
    x, target, mask = torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.rand(2, 3) < 0.5
    with on(backend):
        for reduction, dy in (("none", torch.randn(2, 3)), ("batchmean", torch.randn(()))):
            options = (2.0, reduction, True, backend)
            torch.library.opcheck(torch.ops.fastlm.kl_div_forward, (x, target, mask, *options))
            stats = torch.ops.fastlm.kl_div_forward(x, target, mask, *options)[1]
            torch.library.opcheck(torch.ops.fastlm.kl_div_backward, (dy, x, target, mask, stats, *options))


@directions
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_gradcheck(reverse: bool, reduction: str) -> None:
    x, target = torch.randn(3, 6).double().requires_grad_(), torch.randn(3, 6).double()
    mask = torch.tensor([True, False, True])
    for options in ({}, {"mask": mask, "temperature": 2.5}):
        loss = partial(ops.kl_div, reduction=reduction, reverse=reverse, **options)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target), [x])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(3, 6).requires_grad_()
    with on(backend):
        (dx,) = torch.autograd.grad(ops.kl_div(x, torch.randn(3, 6)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.kl_div(X.long(), X), TypeError, "logits must be floating point"),
        (lambda: ops.kl_div(X, X.long()), TypeError, "target_logits must be floating point"),
        (lambda: ops.kl_div(torch.tensor(1.0), X), ValueError, r"logits must be \(..., V\)"),
        (lambda: ops.kl_div(X[:, :0], X[:, :0]), ValueError, "at least one class"),
        (lambda: ops.kl_div(X, X[:1]), ValueError, r"target_logits must be \(2, 3\)"),
        (lambda: ops.kl_div(X, X.to("meta")), ValueError, "device of logits"),
        (lambda: ops.kl_div(X, X.clone().requires_grad_()), ValueError, "must not require a gradient"),
        (lambda: ops.kl_div(X, X, reduction="mean"), ValueError, "reduction must be"),
        (lambda: ops.kl_div(X, X, temperature=0.0), ValueError, "temperature must be above 0"),
        (lambda: ops.kl_div(X, X, mask=X[:, 0]), TypeError, "mask must be a Tensor of torch.bool"),
        (lambda: ops.kl_div(X, X, mask=X > 0), ValueError, r"mask must be \(2,\)"),
        (lambda: ops.kl_div(X, X, backend="cpu"), fastlm.UnsupportedError, "no backend 'cpu'"),
    ],
)
def test_bad_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
