"""What fastlm.hf.enable() and disable() refuse or leave, with the reason; the model is then as it was."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastlm
from fastlm import hf
from fastlm.patching import swapped
from tests.hf.zoo import build, inputs

NONE = dict.fromkeys(hf.PARTS, False)


def identity(model: nn.Module) -> list[Any]:
    """Everything that a refusal must leave alone: classes, attributes, tensors, configs, functions of the module."""
    modules = [
        (name, type(m), sorted(m.__dict__), m.training, [id(v) for v in m.__dict__.values()])
        for name, m in model.named_modules()
    ]
    tensors = [(name, id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers())]
    config: Any = getattr(model, "config", None)
    settings = None if config is None else (config.to_dict(), config._attn_implementation)
    functions = {name: id(value) for name, value in vars(sys.modules[type(model).__module__]).items()}
    return [modules, tensors, settings, functions]


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear(4, 4), torch.zeros(2), nn.Linear], ids=str)
def test_no_model_of_transformers(model: Any) -> None:
    for function in (hf.enable, hf.disable):
        with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel, got \w+$"):
            function(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, torch.compile])
def test_a_model_inside_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build("llama")
    wrapped = wrap(model)
    before = identity(model)
    with pytest.raises(TypeError, match=r"got .*, with one inside: pass that"):
        hf.enable(wrapped)
    assert identity(model) == before


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: hf.enable(model), lambda: hf.disable(model), hf.register):
        with pytest.raises(ImportError, match=r"needs transformers: pip install 'transformers>=5\.21,<5\.24'"):
            call()


@pytest.mark.parametrize("version", ["5.20.3", "5.24.0", "6.0.0.dev0", "4.57.1", "unknown"])
def test_another_version_of_transformers(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = identity(model)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"from 5\.21 up to, not including, 5\.24; {version} is installed"):
        hf.enable(model)
    assert identity(model) == before


@pytest.mark.parametrize("version", ["5.21.0", "5.23.9.dev0"])
def test_a_version_within(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    hf.enable(build("llama"))


def test_the_versions_are_those_that_are_installed_for_tests() -> None:
    first, beyond = (".".join(map(str, version)) for version in hf.TESTED)
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={first},<{beyond};' in text


def test_nothing_to_replace() -> None:
    class Empty(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = nn.Conv1d(4, 4, 1)

    model = Empty(transformers.LlamaConfig())
    before = identity(model)
    with pytest.raises(ValueError, match=r"model has nothing to replace\. fastlm in Empty: 0 replaced"):
        hf.enable(model)
    assert identity(model) == before
    with pytest.raises(ValueError, match="are all False"):
        hf.enable(build("llama"), **NONE)


def test_twice_and_never() -> None:
    model = build("llama")
    before = identity(model)
    with pytest.raises(ValueError, match="model is not enabled"):
        hf.disable(model)
    hf.enable(model, norm=False)
    enabled = identity(model)
    with pytest.raises(ValueError, match="enabled already, with mlp, rope, attention, loss: call"):
        hf.enable(model)
    with pytest.raises(ValueError, match=r"fastlm\.hf\.disable"):
        fastlm.patch(model)
    assert identity(model) == enabled
    hf.disable(model)
    assert identity(model) == before
    with pytest.raises(ValueError, match="model is not enabled"):
        hf.disable(model)
    fastlm.patch(model)
    with pytest.raises(ValueError, match=r"patched by fastlm\.patch: call fastlm\.unpatch first"):
        hf.enable(model)
    fastlm.unpatch(model)
    assert identity(model) == before


class _Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("part", hf.PARTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_part_that_raises(name: str, part: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    before = identity(model)
    module = importlib.import_module(f"fastlm.hf.{part}")
    apply = module.apply

    def broken(model: nn.Module, report: Any) -> None:
        if when == "after":
            apply(model, report)
        raise _Broken

    monkeypatch.setattr(module, "apply", broken)
    with pytest.raises(_Broken):
        hf.enable(model)
    assert identity(model) == before
    with pytest.raises(ValueError, match="model is not enabled"):
        hf.disable(model)
    monkeypatch.undo()
    hf.enable(model)


def test_an_interrupt_half_way_through_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = identity(model)
    calls: list[Any] = []

    def interrupted(module: nn.Module, layer: type) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        swap(module, layer)

    norm = importlib.import_module("fastlm.hf.norm")
    swap = norm.swap
    monkeypatch.setattr(norm, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf.enable(model)
    assert identity(model) == before


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build("llama").config)
    before = identity(model)
    with pytest.raises(ValueError, match="model is on the meta device: load its weights first"):
        hf.enable(model)
    assert identity(model) == before


def test_layers_without_weights_are_left() -> None:
    model = build("llama")
    model.lm_head.to("meta")
    model.model.norm.to("meta")
    report = hf.enable(model)
    left = {entry.name: entry.reason for entry in report.left}
    assert left.keys() == {"lm_head", "model.norm"}
    assert all("meta device: load the weights first" in reason for reason in left.values())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # the canaries' views
def test_fsdp() -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    batch, model = {**inputs("llama"), "use_cache": False}, build("llama").train()
    expected = model(**batch).loss
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = build("llama")
        fully_shard(sharded)
        before = identity(sharded)
        for function in (hf.enable, hf.disable):
            with pytest.raises(ValueError, match="FSDPLlamaForCausalLM is sharded by FSDP"):
                function(sharded)
        assert identity(sharded) == before
        hf.enable(model)
        fully_shard(model.model.layers[0])
        fully_shard(model)
        loss = model(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        with pytest.raises(ValueError, match="sharded by FSDP"):
            hf.disable(model)
    finally:
        distributed.destroy_process_group()


class _Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Linear8bitLt(nn.Linear):
    """As bitsandbytes' class: its own forward over codes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.data.mul(100).to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.float() / 100)


def _parametrized(model: Any) -> list[str]:
    parametrize.register_parametrization(model.lm_head, "weight", _Same())
    parametrize.register_parametrization(model.model.norm, "weight", _Same())
    return ["is parametrized"]


def _quantised(model: Any) -> list[str]:
    model.lm_head = Linear8bitLt(model.lm_head)
    model.model.layers[0].mlp.up_proj = Linear8bitLt(model.model.layers[0].mlp.up_proj)
    return ["quantised", "Linear8bitLt"]


def _forwards(model: Any) -> list[str]:
    """As accelerate's hooks do it."""
    for module in (model.lm_head, model.model.norm):
        before = module.forward
        module.forward = lambda *args, before=before, **kwargs: before(*args, **kwargs)
    return ["forward was replaced"]


@pytest.mark.parametrize("change", [_parametrized, _quantised, _forwards])
def test_layers_that_are_left(change: Callable[[Any], list[str]]) -> None:
    model, stock = build("llama").train(), build("llama").train()
    words = change(model)
    change(stock)
    before = identity(model)
    report = hf.enable(model)
    left = {entry.name: entry.reason for entry in report.left}
    assert "lm_head" in left
    assert all(any(word in reason for word in words) for reason in left.values()), left
    assert all(swapped(model.get_submodule(entry.name)) is None for entry in report.left)
    batch = inputs("llama")
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss, rtol=1e-5, atol=0.0)
    hf.disable(model)
    assert identity(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "gemma2"])
def test_the_report_fits_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(name)
    model.get_output_embeddings().forward = model.get_output_embeddings().forward
    report = hf.enable(model)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n" and max(map(len, printed.splitlines())) <= 80
    assert printed.splitlines()[0] == f"fastlm in {type(model).__name__}: {len(report.replaced)} replaced, 1 left"
    assert "someone" in printed and "ops.linear, long products in bfloat16" in printed
