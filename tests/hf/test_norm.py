"""fastlm.hf.norm: the formula of each family's norm, and what is left alone."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlm.hf import norm
from fastlm.patching import Report, restore, swapped

N = 48
# name: module, class, arguments
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaRMSNorm", {"hidden_size": N}),
    "qwen3": ("qwen3", "Qwen3RMSNorm", {"hidden_size": N}),
    "mistral": ("mistral", "MistralRMSNorm", {"hidden_size": N, "eps": 1e-5}),
    "t5": ("t5", "T5LayerNorm", {"hidden_size": N}),
    "gemma2": ("gemma2", "Gemma2RMSNorm", {"dim": N}),
    "gemma3": ("gemma3", "Gemma3RMSNorm", {"dim": N}),
    "gemma3n": ("gemma3n", "Gemma3nRMSNorm", {"dim": N}),
    "gemma3n, no scale": ("gemma3n", "Gemma3nRMSNorm", {"dim": N, "with_scale": False}),
    "gpt_oss": ("gpt_oss", "GptOssRMSNorm", {"hidden_size": N}),
    "olmo2": ("olmo2", "Olmo2RMSNorm", {"hidden_size": N}),
    "llama4, no scale": ("llama4", "Llama4TextL2Norm", {}),
    "cohere": ("cohere", "CohereLayerNorm", {"hidden_size": N}),
    "deberta": ("deberta", "DebertaLayerNorm", {"size": N}),
}


def make(name: str) -> nn.Module:
    where, kind, arguments = FAMILIES[name]
    module = getattr(importlib.import_module(f"transformers.models.{where}.modeling_{where}"), kind)(**arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    return module


def patch(module: nn.Module) -> Report:
    report = Report("a model")
    norm.apply(nn.ModuleDict({"norm": module}), report)
    return report


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        assert (f - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name: str) -> None:
    module = make(name)
    for scale in (1.0, 1e-3):  # the second as small as eps
        x, dy = scale * torch.randn(3, 5, N), torch.randn(3, 5, N)
        stock = run(module, x, dy)
        report = patch(module)
        assert [entry.by is not None for entry in report.entries] == [True], str(report)
        assert_close(run(module, x, dy), stock, 2e-6)
        restore(module)
        assert all(torch.equal(f, e) for f, e in zip(run(module, x, dy), stock, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_at_least_as_close_as_stock(name: str) -> None:
    module = make(name).bfloat16()
    x, dy = torch.randn(64, N).bfloat16(), torch.randn(64, N).bfloat16()
    exact = run(copy.deepcopy(module).float(), x.float(), dy.float())
    stock = run(module, x, dy)
    patch(module)
    ours = run(module, x, dy)
    for o, s, e in zip(ours, stock, exact, strict=True):
        assert o.dtype == s.dtype
        assert (o.float() - e).abs().mean() <= 1.02 * (s.float() - e).abs().mean() + 1e-6 * e.abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_dtypes_give_stocks_dtype(name: str) -> None:
    for inside, outside in product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float64)):
        module = make(name).to(inside)
        x, dy = torch.randn(8, N).to(outside), torch.randn(8, N)
        stock = run(module, x, dy)
        patch(module)
        assert_close(run(module, x, dy), stock, 2e-2 if torch.bfloat16 in (inside, outside) else 2e-6)


def test_torchs_own_classes() -> None:
    for module in (
        nn.LayerNorm(N),
        nn.LayerNorm(N, bias=False),
        nn.LayerNorm(N, elementwise_affine=False),
        nn.RMSNorm(N),
    ):
        x, dy = torch.randn(6, N), torch.randn(6, N)
        stock = run(module, x, dy)
        assert len(patch(module).replaced) == 1
        assert_close(run(module, x, dy), stock, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_of_many_rows(dtype: torch.dtype) -> None:
    module = nn.LayerNorm(512).to(dtype)
    with torch.no_grad():
        module.weight.add_(torch.randn(512))
    x, dy = torch.randn(2, 300, 512).to(dtype), torch.randn(2, 300, 512).to(dtype)
    stock = run(module, x, dy)
    patch(module)
    ours = run(module, x, dy)
    assert all(torch.equal(o, s) for o, s in zip(ours, stock, strict=True)) == (dtype is torch.float32)
    exact = run(copy.deepcopy(module).double(), x.double(), dy.double())
    for o, s, e in zip(ours, stock, exact, strict=True):
        assert o.dtype == s.dtype and (o - e).abs().mean() <= 1.02 * (s - e).abs().mean()


def test_eps_is_read_at_the_call() -> None:
    module, x = make("llama"), 1e-3 * torch.randn(4, N)
    patch(module)
    module.variance_epsilon = 0.25  # type: ignore[assignment]
    ours = module(x)
    restore(module)
    torch.testing.assert_close(ours, module(x))


def test_hooks_state_dict_copies_and_pickle() -> None:
    module, x = make("gemma2"), torch.randn(4, N)
    names = list(module.state_dict())
    seen: list[Tensor] = []
    module.register_forward_hook(lambda *a: seen.append(a[-1]))
    patch(module)
    y = module(x)
    assert torch.equal(seen[0], y) and list(module.state_dict()) == names
    module._forward_hooks.clear()
    for double in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            double.weight.zero_()
        assert swapped(double) is norm.FamilyNorm and torch.equal(module(x), y) and not torch.equal(double(x), y)


def test_a_call_that_does_not_fit_is_stocks() -> None:
    module, x = make("llama"), torch.randn(4, N)
    stock = module(x)
    patch(module)
    assert torch.equal(module(hidden_states=x), stock)
    wide = torch.randn(4, 1)  # stock broadcasts
    ours, slope = module(wide), torch.func.grad(lambda x: module(x).sum())(x)
    restore(module)
    assert torch.equal(ours, module(wide)) and torch.equal(slope, torch.func.grad(lambda x: module(x).sum())(x))


class Counting(nn.LayerNorm):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def _foreign() -> nn.Module:
    return Counting(N)


def _replaced() -> nn.Module:
    module = make("llama")
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _gated() -> nn.Module:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    return Qwen3NextRMSNormGated(N)


def _offset() -> nn.Module:
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    return NemotronLayerNorm1P(N)


def _heads() -> nn.Module:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    return CohereLayerNorm((2, N))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_foreign, "tests.hf.test_norm's own"),
        (_replaced, "replaced by someone else's"),
        (_gated, "more than the hidden states"),
        (_offset, "neither LayerNorm nor RMSNorm"),
        (_heads, "one dimension"),
        (lambda: make("llama").to("meta"), "meta device"),
    ],
)
def test_left_alone(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    kind = type(module)
    report = patch(module)
    assert type(module) is kind and [reason in entry.reason for entry in report.left] == [True], str(report)


def test_a_parametrized_norm_is_left() -> None:
    module = make("llama")
    parametrize.register_parametrization(module, "weight", Scaled())
    assert not patch(module).replaced and swapped(module) is None


def test_parametrized_after_patching() -> None:
    module, x = make("olmo2"), torch.randn(4, N)
    patch(module)
    parametrize.register_parametrization(module, "weight", Scaled())
    ours = module(x)
    parametrize.remove_parametrizations(module, "weight")  # leaves the doubled weight
    restore(module)
    torch.testing.assert_close(ours, module(x))


def test_randomness_and_parameters_are_left() -> None:
    module = make("gemma3")
    state, before = torch.get_rng_state(), [p.clone() for p in module.parameters()]
    patch(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(module.parameters(), before, strict=True))
