"""fastlm.hf.enable() with every part on every family: the same model before, during and after."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm.hf
from tests.hf import zoo

each_model = pytest.mark.parametrize("name", zoo.MODELS)
DRAWS = 4
KINDS = ("plain", "left", "right", "packed")
# What transformers itself keeps apart by position_ids alone.
PACKABLE = tuple(name for name in zoo.DECODERS if name != "opt")


def batches(name: str) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in KINDS:
        if (kind == "packed" and name not in PACKABLE) or (kind in ("left", "right") and name == "whisper"):
            continue
        found[kind] = inputs = zoo.inputs(name, kind)
        if kind == "left" and name in zoo.DECODERS:
            # What predicts the first real token sees no key: eager gives it the mean of all values, sdpa and we 0.
            first = inputs["attention_mask"].argmax(-1)
            inputs["labels"][torch.arange(len(first)), first] = -100
    return found


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and every gradient of a training step."""
    model.train()
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return logits, outputs.loss.detach(), grads


def real(inputs: dict[str, Any], name: str) -> Tensor | slice:
    """Where logits mean something."""
    mask = inputs.get("attention_mask")
    return slice(None) if mask is None or name in zoo.SEQ2SEQ else mask.bool()


def close(ours: Tensor, stock: Tensor, least: float = 0.0) -> bool:
    largest = max(stock.abs().max().item(), least)
    return (ours - stock).abs().max().item() <= 1e-5 * largest


def assert_same_step(ours: Any, stock: Any, where: Tensor | slice, what: str) -> None:
    assert close(ours[0][where], stock[0][where]), f"{what}: logits"
    assert close(ours[1], stock[1]), f"{what}: loss"
    assert ours[2].keys() == stock[2].keys()
    # The bias of keys has a gradient of 0 but for rounding, as softmax does not see it: an ulp of the model's largest.
    least = 1e-2 * max(grad.abs().max().item() for grad in stock[2].values())
    wrong = [name for name, grad in stock[2].items() if not close(ours[2][name], grad, least)]
    assert not wrong, f"{what}: gradients of {wrong}"


def assert_same_bits(ours: Any, stock: Any) -> None:
    assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])
    assert all(torch.equal(ours[2][name], grad) for name, grad in stock[2].items())


@each_model
def test_float32(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = zoo.build(name)
    given = batches(name)
    stock = {kind: step(model, inputs) for kind, inputs in given.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = fastlm.hf.enable(model)
    assert str(report) in capsys.readouterr().out
    assert {entry.part for entry in report.replaced} >= {"attention", "norm", "loss"}, report
    for kind, inputs in given.items():
        assert_same_step(step(model, inputs), stock[kind], real(inputs, name), f"{name} {kind}")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fastlm.hf.disable(model)
    for kind, inputs in given.items():
        assert_same_bits(step(model, inputs), stock[kind])


@each_model
def test_evaluation_and_what_the_model_returns(name: str) -> None:
    """eval(), with and without labels, as tuples too."""
    model = zoo.build(name).eval()
    inputs = batches(name).get("right", zoo.inputs(name))
    bare = {key: value for key, value in inputs.items() if key != "labels"}
    where = real(inputs, name)

    def look() -> list[Any]:
        with torch.no_grad():
            labelled, plain, listed = model(**inputs), model(**bare), model(**inputs, return_dict=False)
        assert plain.get("loss") is None
        assert type(labelled.logits) is Tensor
        return [labelled.loss, labelled.logits[where], plain.logits[where], listed[0], listed[1][where], list(labelled)]

    stock = look()
    fastlm.hf.enable(model)
    ours = look()
    assert ours.pop() == stock.pop()
    assert all(close(a, b) for a, b in zip(ours, stock, strict=True))


def squared_errors(step_: Any, exact: Any, where: Tensor | slice) -> dict[str, float]:
    """Of logits, loss and gradients, relative to what they should be."""
    pairs = {"logits": (step_[0][where], exact[0][where]), "loss": (step_[1], exact[1])}
    pairs |= {name: (step_[2][name], grad) for name, grad in exact[2].items()}
    least = 1e-2 * max(grad.norm().item() for grad in exact[2].values())  # a bias of keys has none
    return {name: ((a.float() - b).norm().item() / max(b.norm().item(), least)) ** 2 for name, (a, b) in pairs.items()}


@each_model
def test_bfloat16(name: str) -> None:
    """As far from float32 as stock is, no further, over a few draws of the weights: one alone is mostly chance."""
    model, wide, enabled = zoo.build(name).bfloat16(), zoo.build(name), zoo.build(name).bfloat16()
    fastlm.hf.enable(enabled)
    inputs = batches(name).get("left", zoo.inputs(name))
    where, low = real(inputs, name), dict(inputs)
    if "input_features" in inputs:
        low["input_features"] = inputs["input_features"].bfloat16()
    ours: Counter[str] = Counter()
    stock: Counter[str] = Counter()
    with torch.no_grad():
        start = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(DRAWS):
        for key, value in start.items():
            drawn = (value + 0.02 * torch.randn(value.shape)).bfloat16()
            for each in (model, wide, enabled):
                each.get_parameter(key).data.copy_(drawn)
        exact = step(wide, inputs)
        for found, each in ((ours, enabled), (stock, model)):
            found.update(squared_errors(step(each, low), exact, where))
    for key, total in stock.items():
        error, allowed = (ours[key] / DRAWS) ** 0.5, (total / DRAWS) ** 0.5
        assert error <= 1.5 * allowed + 2**-8, f"{name} {key}: {error:.2e}, stock {allowed:.2e}"


@each_model
def test_saved_and_loaded(name: str, tmp_path: Any) -> None:
    model = zoo.build(name)
    model.save_pretrained(tmp_path / "stock")
    fastlm.hf.enable(model)
    model.save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    fastlm.hf.disable(model)
    loaded = type(model).from_pretrained(tmp_path / "ours")
    inputs = zoo.inputs(name)
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5"])
def test_autocast_and_checkpointing(name: str) -> None:
    model = zoo.build(name)
    inputs = batches(name)["right"]
    exact = step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, inputs)
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # 5.23 renamed it
    switch({"use_reentrant": False})
    fastlm.hf.enable(model)
    assert_same_step(step(model, inputs), exact, real(inputs, name), f"{name} checkpointed")
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model, inputs)
    for key, right in exact[2].items():
        assert ours[2][key].dtype == stock[2][key].dtype
        error, allowed = ((grads[2][key] - right).norm().item() for grads in (ours, stock))
        assert error <= 1.5 * allowed + 2 * 2**-8 * right.norm().item(), f"{name} {key}: {error:.2e}, {allowed:.2e}"


def test_torch_compile() -> None:
    torch._dynamo.reset()
    model = zoo.build("llama", num_hidden_layers=1)
    inputs = {**batches("llama")["left"], "use_cache": False}
    stock = step(model, inputs)
    fastlm.hf.enable(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    outputs = compiled(**inputs)
    outputs.loss.backward()
    where = real(inputs, "llama")
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_same_step((outputs.logits, outputs.loss, grads), stock, where, "compiled")


def test_experts_in_float32_are_enabled_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors cannot run their grouped product, and torch logs that as an error."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": zoo.VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    inputs = zoo.inputs("llama")
    stock = step(model, inputs)
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Logger, "handle", lambda self, record: self.disabled or logged.append(record))
    fastlm.hf.enable(model)
    assert not logged
    assert_same_step(step(model, inputs), stock, slice(None), "mixtral")
