"""fastlm.hf.mlp: gated feed-forward parts and GELU of each family, and what is left alone."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlm.hf import mlp
from fastlm.patching import Report, restore, swapped
from fastlm.patching._feed_forward import FeedForward
from tests.hf import zoo

N, HIDDEN = 32, 48
COMMON = {
    "hidden_size": N, "intermediate_size": HIDDEN, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1,
}  # fmt: skip
# name: module, class, what its config has beside COMMON
GATED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaMLP", {}),
    "llama with biases": ("llama", "LlamaMLP", {"mlp_bias": True}),
    "qwen3": ("qwen3", "Qwen3MLP", {}),
    "mistral": ("mistral", "MistralMLP", {}),
    "gemma2": ("gemma2", "Gemma2MLP", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gelu": ("llama", "LlamaMLP", {"hidden_act": "gelu"}),
    "gelu_new": ("llama", "LlamaMLP", {"hidden_act": "gelu_new"}),
    "phi3": ("phi3", "Phi3MLP", {}),
    "modernbert": ("modernbert", "ModernBertMLP", {
        "hidden_activation": "gelu", "mlp_dropout": 0.0, "mlp_bias": False,
    }),
    "t5": ("t5", "T5DenseGatedActDense", {
        "d_model": N, "d_ff": HIDDEN, "dropout_rate": 0.0, "dense_act_fn": "gelu_new",
    }),
}  # fmt: skip


def make(name: str) -> nn.Module:
    where, kind, changes = GATED[name]
    module = getattr(importlib.import_module(f"transformers.models.{where}.modeling_{where}"), kind)
    made: nn.Module = module(SimpleNamespace(**{**COMMON, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made


def patch(module: nn.Module) -> Report:
    report = Report("a model")
    mlp.apply(nn.ModuleDict({"mlp": module}), report)
    report.entries = [entry for entry in report.entries if entry.kind != "Linear"]
    return report


def unpatch(module: nn.Module) -> None:
    for each in module.modules():
        restore(each)


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        assert (f - e).abs().max() <= tolerance * e.abs().max()


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The mean over all numbers, each tensor in units of its own size."""
    parts = [((f.double() - e).abs() / e.double().abs().mean()).flatten() for f, e in zip(found, exact, strict=True)]
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("name", GATED)
def test_float32(name: str) -> None:
    module, x, dy = make(name), 2 * torch.randn(2, 5, N), torch.randn(2, 5, N)
    stock = run(module, x, dy)
    report = patch(module)
    assert [entry.by is not None for entry in report.entries] == [True], str(report)
    assert_close(run(module, x, dy), stock, 2e-6)
    unpatch(module)
    assert all(torch.equal(f, e) for f, e in zip(run(module, x, dy), stock, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", GATED)
def test_bfloat16_is_at_least_as_close_as_stock(name: str, autocast: bool) -> None:
    module = make(name).bfloat16()
    x, dy = torch.randn(32, N).bfloat16(), torch.randn(32, N).bfloat16()
    if "Dense" not in type(module).__name__:
        x, dy = x[None], dy[None]
    exact = run(copy.deepcopy(module).float(), x.float(), dy.float())
    if autocast:
        module, x, dy = module.float(), x.float(), dy.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = run(module, x, dy)
        patch(module)
        ours = run(module, x, dy)
    assert [o.dtype for o in ours] == [s.dtype for s in stock]
    assert error(ours, exact) <= 1.05 * error(stock, exact)


def test_t5_keeps_its_last_projection_in_float32() -> None:
    module, x = make("t5").bfloat16(), torch.randn(4, N).bfloat16()
    module.wo.float()  # type: ignore[union-attr]
    stock = module(x)
    patch(module)
    assert stock.dtype is torch.float32
    assert_close([module(x)], [stock], 2e-2)


def test_hooks_and_layers_put_inside_later() -> None:
    module, x = make("llama"), torch.randn(4, N)
    patch(module)
    seen: list[str] = []
    for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    stock_like = module(x)
    assert sorted(seen) == ["act_fn", "down_proj", "gate_proj", "up_proj"]
    module.act_fn._forward_hooks.clear()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(module(x), stock_like)
    module.act_fn = nn.ReLU()
    changed = module(x)
    unpatch(module)
    assert torch.equal(changed, module(x))


def test_peft_inside() -> None:
    peft = pytest.importorskip("peft")
    holder = nn.ModuleDict({"mlp": make("qwen3")})
    x, dy = torch.randn(4, N), torch.randn(4, N)
    mlp.apply(holder, Report("a model"))
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), holder
    )
    module = adapted["mlp"]
    trained = [p for p in module.parameters() if p.requires_grad]
    ours = torch.autograd.grad(module(x), trained, dy)
    assert len(trained) == 6 and swapped(module) is FeedForward
    restore(module)
    assert_close(list(ours), list(torch.autograd.grad(module(x), trained, dy)), 2e-6)


def test_a_layer_inside_that_gives_another_dtype() -> None:
    module, x = make("llama"), torch.randn(4, N)

    class Wide(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).double()

    module.up_proj.__class__ = Wide
    module.down_proj.double()  # type: ignore[union-attr]
    stock = module(x)
    patch(module)
    torch.testing.assert_close(module(x), stock)


def test_dropout_acts_where_it_did() -> None:
    module, x = make("t5").train(), torch.randn(64, N)
    module.dropout.p = 0.5  # type: ignore[union-attr, assignment]
    patch(module)
    torch.manual_seed(3)
    ours = module(x)
    restore(module)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, module(x))


def test_copies_and_pickle() -> None:
    module, x = make("mistral"), torch.randn(4, N)
    names = list(module.state_dict())
    patch(module)
    y = module(x)
    assert list(module.state_dict()) == names
    for double in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            double.up_proj.weight.zero_()
        assert swapped(double) is FeedForward and not double(x).any() and torch.equal(module(x), y)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "gate_proj up_proj down_proj"), ("gpt2", "c_fc c_proj"), ("bert", "intermediate.dense output.dense"),
        ("opt", "fc1 fc2"), ("bart", "fc1 fc2"), ("t5", "wi wo"),
    ],
)  # fmt: skip
def test_projections_of_a_model(name: str, expected: str) -> None:
    model, report = zoo.build(name), Report("a model")
    mlp.apply(model, report)
    found = [entry.name for entry in report.replaced if entry.kind in ("Linear", "Conv1D")]
    assert len(set(found)) == len(found)
    layers = model.config.num_hidden_layers * (2 if name in zoo.SEQ2SEQ else 1)
    for end in expected.split():
        assert sum(n.endswith("." + end) and "attention" not in n for n in found) == layers, (end, found)


@pytest.mark.parametrize("name", ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"])
def test_gelu(name: str) -> None:
    from transformers.activations import ACT2FN

    module: nn.Module = ACT2FN[name]
    x, dy = 3 * torch.randn(5, 40), torch.randn(5, 40)
    stock, exact = run(module, x, dy), run(copy.deepcopy(module), x.double(), dy.double())
    low = run(module, x.bfloat16(), dy.bfloat16())
    assert len(patch(module).replaced) == 1
    assert_close(run(module, x, dy), stock, 2e-6)
    for o, s, e in zip(run(module, x.bfloat16(), dy.bfloat16()), low, exact, strict=True):
        assert (o - e).abs().mean() <= 1.02 * (s - e).abs().mean()
    unpatch(module)
    assert all(torch.equal(f, e) for f, e in zip(run(module, x, dy), stock, strict=True))


def test_torchs_gelu() -> None:
    for module in (nn.GELU(), nn.GELU(approximate="tanh")):
        x, dy = torch.randn(5, 40), torch.randn(5, 40)
        stock = run(module, x, dy)
        assert len(patch(module).replaced) == 1
        assert_close(run(module, x, dy), stock, 2e-6)


class Users(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def _quick() -> nn.Module:
    from transformers.activations import QuickGELUActivation

    return QuickGELUActivation()


def _relu() -> nn.Module:
    module = make("llama")
    module.act_fn = nn.ReLU()
    return module


def _users_activation() -> nn.Module:
    module = make("gelu")
    module.act_fn = Users()
    return module


def _more() -> nn.Module:
    module = make("llama")
    module.scale = nn.Parameter(torch.ones(1))
    return module


@pytest.mark.parametrize(
    ("build", "reason", "count"),
    [
        (_quick, "neither GELU nor its tanh form", 1),
        (Users, "tests.hf.test_mlp's own", 1),
        (_relu, "with silu or gelu", 1),
        (_users_activation, "tests.hf.test_mlp's own", 2),  # the part, and the activation
        (_more, "may use scale too", 1),
    ],
)
def test_left_alone(build: Callable[[], nn.Module], reason: str, count: int) -> None:
    module = build()
    kind = type(module)
    report = patch(module)
    assert type(module) is kind and [reason in e.reason for e in report.left] == [True] * count, str(report)


def test_randomness_is_left() -> None:
    module = make("t5")
    state = torch.get_rng_state()
    patch(module)
    assert torch.equal(torch.get_rng_state(), state)
