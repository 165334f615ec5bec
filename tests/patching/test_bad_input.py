"""What patch() and unpatch() refuse or leave, with the reason; the model is then as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastlm
import fastlm.hf
from fastlm.patching import _patch, swap
from tests.patching.test_patch import identity, run
from tests.patching.zoo import MODELS, build


def reasons(model: nn.Module) -> dict[str, str]:
    """name: reason of everything left; what was replaced must have been put back by an error."""
    return {entry.name: entry.reason for entry in fastlm.patch(model).left}


@pytest.mark.parametrize("model", [None, "model", nn.LayerNorm, torch.zeros(2), [nn.LayerNorm(4)]])
def test_no_module(model: Any) -> None:
    for function in (fastlm.patch, fastlm.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got "):
            function(model)


def test_nothing_to_replace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1))
    before = identity(model)
    with pytest.raises(ValueError, match=r"nothing to replace, of torch\.nn\.LayerNorm.* feed-forward modules"):
        fastlm.patch(model)
    with pytest.raises(ValueError, match=r"of torch\.nn\.LayerNorm, torch\.nn\.RMSNorm, RMSNorms of any class\. "):
        fastlm.patch(model, attention=False, mlp=False, loss=False)
    with pytest.raises(ValueError, match="all False"):
        fastlm.patch(model, attention=False, norm=False, mlp=False, loss=False)
    with pytest.raises(ValueError, match="not patched"):
        fastlm.unpatch(model)
    assert identity(model) == before


def test_nothing_but_fastlm_s_own_layers() -> None:
    with pytest.raises(ValueError, match="it is fastlm's own"):
        fastlm.patch(nn.Sequential(fastlm.nn.LayerNorm(4)))


def test_twice() -> None:
    model = build("llama")
    fastlm.patch(model)
    patched = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="patched already"):
        fastlm.patch(model)
    assert [type(m) for m in model.modules()] == patched
    fastlm.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        fastlm.unpatch(model)
    fastlm.patch(model)


def test_a_model_that_fastlm_hf_enabled() -> None:
    model = build("llama")
    model.__dict__[fastlm.patching.ENABLED] = "norm"
    for function in (fastlm.patch, fastlm.unpatch):
        with pytest.raises(ValueError, match=r"fastlm\.hf\.disable"):
            function(model)


@pytest.mark.parametrize("name", MODELS)
def test_an_error_midway_restores_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    stock, before, classes = run(model, name), identity(model), [type(m) for m in model.modules()]
    for n in range(1, 5):
        swaps = 0

        def fail(module: nn.Module, layer: type, n: int = n) -> None:
            nonlocal swaps
            swaps += 1
            if swaps == n:
                raise KeyboardInterrupt
            swap(module, layer)

        monkeypatch.setattr(_patch, "swap", fail)
        with pytest.raises(KeyboardInterrupt):
            fastlm.patch(model)
        assert identity(model) == before and [type(m) for m in model.modules()] == classes
    found = run(model, name)
    assert all(torch.equal(found[key], value) for key, value in stock.items())


def test_an_error_midway_keeps_what_was_patched_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    fastlm.patch(model, attention=False, mlp=False, loss=False)
    classes = [type(m) for m in model.modules()]

    def fail(module: nn.Module, layer: type) -> None:
        raise RuntimeError("midway")

    monkeypatch.setattr(_patch, "swap", fail)
    with pytest.raises(RuntimeError, match="midway"):
        fastlm.patch(model)
    assert [type(m) for m in model.modules()] == classes


class OwnForward(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnConstructor(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-3)

    def extra_repr(self) -> str:
        return "mine"


def parametrized(norm: nn.LayerNorm) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(norm, "weight", Double())


def foreign_forward(norm: nn.LayerNorm) -> None:
    norm.forward = lambda x: x  # type: ignore[method-assign, assignment]


def on_meta(norm: nn.LayerNorm) -> None:
    norm.to("meta")


def as_subclass(norm: nn.LayerNorm) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    norm.weight = nn.Parameter(TwoTensor(torch.ones(8), torch.ones(8)))


OBSTACLES: dict[str, tuple[Callable[[nn.LayerNorm], None], str]] = {
    "parametrized": (parametrized, "its weight is parametrized"),
    "foreign forward": (foreign_forward, "its forward was replaced by someone else's"),
    "meta": (on_meta, "its weight is on the meta device: load the weights first"),
    "subclass of Tensor": (as_subclass, "its weight is a TwoTensor"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_left_with_its_reason(what: str) -> None:
    make, reason = OBSTACLES[what]
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    make(model[1])
    kind = type(model[1])
    assert reasons(model) == {"1": reason} and type(model[1]) is kind
    fastlm.unpatch(model)
    with pytest.raises(ValueError, match=r"nothing to replace(.|\n)*" + reason.partition(" (")[0].replace(" ", r"\s+")):
        fastlm.patch(model[1])


def test_subclasses() -> None:
    model = nn.Sequential(OwnForward(8), OwnConstructor(8))
    x = torch.randn(3, 8)
    expected = model(x)
    assert reasons(model) == {"0": "its class has its own forward"}
    assert repr(model[1]) == "OwnConstructor(mine)" and isinstance(model[1], OwnConstructor)
    torch.testing.assert_close(model(x), expected)
    fastlm.unpatch(model)
    assert type(model[1]) is OwnConstructor and torch.equal(model(x), expected)


def test_lazily_initialised() -> None:
    class LazyNorm(nn.modules.lazy.LazyModuleMixin, nn.LayerNorm):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(1)
            self.weight = nn.UninitializedParameter()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(LazyNorm(), nn.RMSNorm(8))
    assert reasons(model) == {"0": "its weight is not initialised yet"}


def test_weight_norm_and_spectral_norm_stay_what_they_are() -> None:
    """Old style (a hook that sets the weight) and new (a parametrization of a child)."""
    for normalise in (nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal):
        model = build("llama").eval()
        normalise(model.blocks[0].mlp.w1)  # type: ignore[operator, index, union-attr]
        stock = run(model, "llama")
        fastlm.patch(model)
        found = run(model, "llama")
        assert all((found[key] - value).abs().max() <= 1e-5 * value.abs().max() for key, value in stock.items())
        fastlm.unpatch(model)
        assert all(torch.equal(value, stock[key]) for key, value in run(model, "llama").items())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*deprecated")
def test_quantised_layers() -> None:
    model = build("llama").eval()
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    data = torch.randint(1, 90, (2, 6))
    stock = model(data, data)
    report = fastlm.patch(model)
    assert {entry.by for entry in report.replaced} >= {"nn.RMSNorm", "ops.swiglu"}  # which call quantised products
    for found, expected in zip(model(data, data), stock, strict=True):
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()  # a step of the 8-bit activations
    fastlm.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(model(data, data), stock, strict=True))

    norm = torch.ao.nn.quantized.LayerNorm(8, nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), 1.0, 0)
    assert reasons(nn.Sequential(norm, nn.RMSNorm(8))) == {"0": "its class has its own forward"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert reasons(nn.Sequential(scripted, nn.RMSNorm(4))) == {"0.1": "it is compiled by TorchScript"}
    with pytest.raises(ValueError, match="compiled by TorchScript"):
        fastlm.patch(scripted)


def test_transformers_models_are_patched_or_enabled() -> None:
    pytest.importorskip("transformers")
    from tests.hf import zoo

    model = zoo.build("gpt2").eval()
    tokens = torch.randint(32, (2, 8))
    stock = model(tokens, labels=tokens)
    assert {entry.kind for entry in fastlm.patch(model).replaced} >= {"LayerNorm"}
    found = model(tokens, labels=tokens)
    torch.testing.assert_close(found.logits, stock.logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"call fastlm\.unpatch first"):
        fastlm.hf.enable(model)
    fastlm.unpatch(model)
    fastlm.hf.enable(model, attention=False, norm=False, mlp=False, rope=False)
    with pytest.raises(ValueError, match=r"call fastlm\.hf\.disable first"):
        fastlm.patch(model)
