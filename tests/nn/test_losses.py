"""fastlm.nn.functional's losses beside torch.nn.functional's: values, dtypes, shapes, and the same exceptions."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from fastlm.nn import functional as F
from tests.ops.harness import differentiate

needs_torch_213 = pytest.mark.skipif(not hasattr(T, "linear_cross_entropy"), reason="torch 2.13 has it first")
INDEX = torch.tensor([1, 2, 0, -100])


def parameters(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: list[Tensor | None]) -> None:
    actual, grads = differentiate(ours, tensors)
    expected, expected_grads = differentiate(theirs, tensors)
    assert actual[0].dtype == expected[0].dtype and actual[0].shape == expected[0].shape
    half = tensors[0] is not None and tensors[0].dtype in (torch.bfloat16, torch.float16)
    close = {"rtol": 4e-2, "atol": 2e-2} if half else {}
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True, **close)
    for mine, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, **close)


def test_signature() -> None:
    assert parameters(F.cross_entropy) == parameters(T.cross_entropy)


@needs_torch_213
def test_signature_of_the_linear_one() -> None:
    assert parameters(F.linear_cross_entropy) == parameters(T.linear_cross_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 7), (4, 7, 3), (2, 7, 3, 5), (0, 7), (0, 7, 3)], ids=str)
def test_cross_entropy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    target = torch.randint(7, shape[:1][: len(shape) - 1] + shape[2:])
    if target.numel() > 1:
        target.view(-1)[0] = -100
    for reduction, smoothing, weight in itertools.product(("none", "mean", "sum"), (0.0, 0.1), (None, torch.rand(7))):
        weight = None if weight is None else weight.to(dtype)
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        same(
            lambda x, o=options: F.cross_entropy(x, target, **o),
            lambda x, o=options: T.cross_entropy(x, target, **o),
            [x],
        )


def test_class_probabilities() -> None:
    for shape in ((7,), (4, 7), (2, 7, 3)):
        x, p = torch.randn(shape), torch.randn(shape).softmax(0 if len(shape) == 1 else 1)
        for reduction in ("none", "mean", "sum"):
            options = {"reduction": reduction, "weight": torch.rand(7), "label_smoothing": 0.1}
            same(
                lambda x, p, o=options: F.cross_entropy(x, p, **o),
                lambda x, p, o=options: T.cross_entropy(x, p, **o),
                [x, p],
            )


def test_deprecated_arguments() -> None:
    x = torch.randn(4, 7)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is None and reduce is None:
            continue
        with pytest.warns(UserWarning, match="deprecated"):
            expected = T.cross_entropy(x, INDEX, size_average=size_average, reduce=reduce)
        with pytest.warns(UserWarning, match="deprecated"):
            actual = F.cross_entropy(x, INDEX, size_average=size_average, reduce=reduce)
        torch.testing.assert_close(actual, expected)


def test_autocast_gives_float32() -> None:
    x, head = torch.randn(4, 8), torch.randn(7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in (
            (F.cross_entropy(x.bfloat16(), INDEX), T.cross_entropy(x.bfloat16(), INDEX)),
            (F.linear_cross_entropy(x, head, INDEX), T.cross_entropy(T.linear(x, head), INDEX)),
        ):
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def unfused(x: Tensor, head: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any) -> Tensor:
    """What linear_cross_entropy is by definition, for torch before 2.13."""
    flat = head.reshape(-1, head.shape[-1])
    logits = T.linear(x, flat, None if linear_bias is None else linear_bias.reshape(-1))
    return T.cross_entropy(logits.reshape(*x.shape[:-1], *head.shape[:-1]), target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["rows", "one row", "places", "probabilities"])
def test_linear_cross_entropy(dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(8) if kind == "one row" else torch.randn(4, 8)
    head, bias = torch.randn(7, 8) * 0.3, torch.randn(7)
    target = INDEX
    if kind == "one row":
        target = torch.tensor(3)
    elif kind == "places":
        head, bias, target = torch.randn(7, 2, 3, 8) * 0.3, torch.randn(7, 2, 3), torch.randint(7, (4, 2, 3))
    elif kind == "probabilities":
        target = torch.randn(4, 7).softmax(1).to(dtype)
    for reduction, smoothing, weight in itertools.product(("none", "mean", "sum"), (0.0, 0.1), (None, torch.rand(7))):
        weight = None if weight is None else weight.to(dtype)
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        for tensors in ([x, head, bias], [x, head, None]):
            same(
                lambda x, w, b, o=options: F.linear_cross_entropy(x, w, target, linear_bias=b, **o),
                lambda x, w, b, o=options: unfused(x, w, target, b, **o),
                [None if t is None else t.to(dtype) for t in tensors],
            )


@needs_torch_213
def test_options_are_accepted() -> None:
    x, head = torch.randn(4, 8), torch.randn(7, 8)
    options = torch.nn.LinearCrossEntropyOptions()
    torch.testing.assert_close(
        F.linear_cross_entropy(x, head, INDEX, options=options), T.linear_cross_entropy(x, head, INDEX)
    )


X, H, W = torch.ones(4, 7), torch.ones(4, 8), torch.ones(7, 8)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X, INDEX[:3]), {}),
        ((X, INDEX + 7), {}),
        ((X, torch.tensor([0, 1, 2, -1])), {}),
        ((X, INDEX.int()), {}),
        ((X, INDEX.float()), {}),
        ((X.long(), INDEX.abs() % 7), {}),
        ((torch.tensor(1.0), torch.tensor(0)), {}),
        ((X[:, :0], INDEX.abs() % 1), {}),
        ((X, INDEX), {"reduction": "max"}),
        ((X, INDEX), {"label_smoothing": 2.0}),
        ((X, INDEX), {"weight": torch.ones(4)}),
        ((X, INDEX), {"weight": torch.ones(7, dtype=torch.float64)}),
        ((X, INDEX), {"weight": torch.ones(7, requires_grad=True)}),
        ((X, INDEX.to("meta")), {}),
    ],
)
def test_cross_entropy_raises_what_torch_raises(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        T.cross_entropy(*arguments, **options)
    with pytest.raises(type(theirs.value)):
        F.cross_entropy(*arguments, **options)


@needs_torch_213
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((H[None], W, INDEX), {}),
        ((H, W[0], INDEX), {}),
        ((H, W[:, :5], INDEX), {}),
        ((H, W, INDEX), {"linear_bias": torch.ones(3)}),
        ((H[0], torch.ones(7, 2, 8), INDEX), {}),
        ((H, W, torch.ones(4, 7)), {"ignore_index": 0}),
        ((H, W, INDEX[:3]), {}),
        ((H, W, INDEX + 7), {}),
        ((H, W.double(), INDEX), {}),
        ((H, W, INDEX), {"weight": torch.ones(3)}),
        ((H, W, INDEX), {"reduction": "max"}),
    ],
)
def test_linear_cross_entropy_raises_what_torch_raises(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        T.linear_cross_entropy(*arguments, **options)
    with pytest.raises(type(theirs.value)):
        F.linear_cross_entropy(*arguments, **options)
