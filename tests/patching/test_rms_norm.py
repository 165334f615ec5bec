"""Which modules of a user's class are recognised as RMSNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from tests.patching.zoo import Calls

N = 24


def norm(forward: Callable[[Any, Tensor], Any], eps: float = 1e-5, **attributes: Any) -> nn.Module:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.weight = eps, nn.Parameter(torch.randn(N))

    Norm.forward = forward  # type: ignore[assignment]
    module = Norm()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def llama(self: Any, x: Tensor) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
    return y.type_as(x) * self.weight


def transformers(self: Any, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * x.to(dtype)


def gemma(self: Any, x: Tensor) -> Tensor:
    y = x.float() / torch.sqrt(torch.mean(x.float() * x.float(), dim=-1, keepdim=True) + self.eps)
    return (y * (1.0 + self.weight.float())).type_as(x)


def plain(self: Any, x: Tensor) -> Tensor:
    return x * (torch.mean(x**2, -1, True) + self.eps) ** -0.5 * self.weight


FORMS = {form.__name__: form for form in (llama, transformers, gemma, plain)}
OTHERS = {
    "the root of the mean without eps": lambda m, x: x / x.pow(2).mean(-1, keepdim=True).sqrt() * m.weight,
    "eps outside the root": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + m.eps) * m.weight,
    "another eps": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * m.eps) * m.weight,
    "the sum": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + m.eps) * m.weight,
    "another dimension": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + m.eps) * m.weight,
    "sequences alone": lambda m, x: x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + m.eps) * m.weight,
    "the mode": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps) * (m.weight if m.training else 1),
    "a residual": lambda m, x: x + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps) * m.weight,
    "LayerNorm": lambda m, x: torch.nn.functional.layer_norm(x, (N,), m.weight, None, m.eps),
}


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)]


def fused(module: nn.Module, x: Tensor) -> bool:
    with Calls() as calls:
        module(x)
    return calls.seen == ["rms_norm_forward"]


@pytest.mark.parametrize("form", FORMS)
def test_recognised(form: str) -> None:
    module, x = norm(FORMS[form]), 0.01 * torch.randn(3, 5, N)
    stock = results(module, x)
    (entry,) = fastlm.patch(module).entries
    assert (entry.kind, entry.part, entry.by) == ("Norm", "norm", "ops.rms_norm")
    assert fused(module, x)
    for found, expected in zip(results(module, x), stock, strict=True):
        assert found.dtype is expected.dtype and (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="patched already"):
        fastlm.patch(module)
    fastlm.unpatch(module)
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), stock, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_in_half_types_no_less_exact_than_stock(form: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        module, x = norm(FORMS[form]).to(dtype), torch.randn(30, N).to(dtype)
        exact = results(copy.deepcopy(module).double(), x.double())
        stock = results(module, x)
        fastlm.patch(module)
        assert fused(module, x)
        for found, was, true in zip(results(module, x), stock, exact, strict=True):
            scale = torch.finfo(dtype).eps * true.abs().max()
            assert found.dtype is dtype
            assert (found.double() - true).abs().max() <= 2 * (was.double() - true).abs().max() + scale


@pytest.mark.parametrize("what", OTHERS)
def test_not_recognised(what: str) -> None:
    with pytest.raises(ValueError, match="nothing to replace"):
        fastlm.patch(norm(OTHERS[what]))


def test_what_does_not_fit_goes_to_the_original() -> None:
    module, x = norm(llama), torch.randn(3, N)
    stock = copy.deepcopy(module)
    fastlm.patch(module)
    for call in (x.bfloat16(), x.double()):  # beside a float32 weight
        assert not fused(module, call) and torch.equal(module(call), stock(call))
    module.eps = stock.eps = 0.5
    assert not fused(module, x) and torch.equal(module(x), stock(x))
    module.eps = stock.eps = 1e-5
    assert fused(module, x) and fused(copy.deepcopy(module), x)
    with pytest.raises(RuntimeError):
        module(x[:, 1:])
