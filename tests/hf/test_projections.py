"""Linear and Conv1D in a transformers model: over ops.linear where that pays, else bit for bit what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlm.hf import _linear
from fastlm.hf._linear import swap_linears
from fastlm.patching import Report, restore
from tests.ops.harness import BACKWARD, FORWARD, assert_accurate, assert_same_bits


def layer(kind: str) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear(40, 24) if kind == "Linear" else Conv1D(24, 40)


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = [x, *module.parameters()]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_long_products_in_bfloat16(kind: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_ROWS", 60)
    monkeypatch.setattr(_linear, "_PRODUCTS", 1)
    called: list[int] = []
    ours = _linear.F.linear
    monkeypatch.setattr(_linear.F, "linear", lambda *a: called.append(1) or ours(*a))
    model = nn.Sequential(layer(kind)).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(2, 30, 40).bfloat16()
    exact, exact_grads = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock, stock_grads = run(model, x)
        report = Report("model")
        swap_linears("", model, "attention", report)
        y, grads = run(model, x)
    assert called and [e.name for e in report.replaced] == ["0"] and report.replaced[0].kind == kind
    assert y.dtype == stock.dtype and all(grad.is_contiguous() for grad in grads)
    assert_accurate("y", y, exact, stock, FORWARD)
    for name, grad, want, theirs in zip(("dx", "dweight", "dbias"), grads, exact_grads, stock_grads, strict=True):
        assert grad.dtype == theirs.dtype
        assert_accurate(name, grad, want, theirs, BACKWARD)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_ones_are_what_they_were(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(kind)).to(dtype)
    x = torch.randn(2, 30, 40).to(dtype)
    stock = run(model, x)
    swap_linears("", model, "attention", Report("model"))
    ours = run(model, x)
    assert_same_bits([stock[0], *stock[1]], [ours[0], *ours[1]])
    assert restore(model[0])


def test_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.ModuleDict({"mine": Mine(2, 2), "twice": nn.Linear(2, 2)})
    parametrize.register_parametrization(model["twice"], "weight", Twice())
    report = Report("model")
    swap_linears("part", model, "attention", report)
    assert not report.replaced and all("param" in e.reason for e in report.left)
    report = Report("model")
    plain = nn.Sequential(nn.Linear(2, 2))
    swap_linears("a.b", plain, "attention", report)
    swap_linears("a.b", plain, "attention", report)
    assert [e.name for e in report.entries] == ["a.b.0"]
