"""fastlm.hf.rope: the rotary embedding of each family, and what is left alone."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fastlm import ops
from fastlm.hf import rope
from fastlm.patching import Report, restore, swapped
from tests.hf import zoo

ROTARY = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt_neox", "modernbert")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The queries that ops.rope was called with."""
    seen: list[Tensor] = []
    op: Any = ops.rope

    def spy(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q)
        return op(q, *args, **kwargs)

    rope._rebind.cache_clear()
    monkeypatch.setattr(ops, "rope", spy)
    yield seen
    rope._rebind.cache_clear()


def patch(model: nn.Module) -> Report:
    report = Report("a model")
    rope.apply(model, report)
    return report


def run(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    out = model(**batch)
    model.zero_grad()
    out.loss.backward()
    return [out.logits.detach(), out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and (f - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ROTARY for k in ("plain", "left", "packed") if n in zoo.DECODERS or k != "packed"],
)
def test_float32(name: str, kind: str, calls: list[Tensor]) -> None:
    model, batch = zoo.build(name), zoo.inputs(name, kind)
    stock = run(model, batch)
    report = patch(model)
    calls.clear()
    assert len(report.replaced) == 2 and not report.left, str(report)
    assert_close(run(model, batch), stock, 1e-5)
    assert len(calls) == 2
    for module in model.modules():
        restore(module)
    assert all(torch.equal(f, e) for f, e in zip(run(model, batch), stock, strict=True))


def test_autocast_keeps_the_products_dtype(calls: list[Tensor]) -> None:
    model, batch = zoo.build("mistral"), zoo.inputs("mistral", "left")
    patch(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(model, batch)[1]
    assert loss.isfinite() and [q.dtype for q in calls] == [torch.bfloat16] * 2


# How pairs lie in the table, whether they are interleaved in q and k, and whether channels may be left over.
FUNCTIONS = {
    "llama": ("doubled", False, False), "gpt_neox": ("doubled", False, True), "phi3": ("doubled", False, True),
    "olmo2": ("doubled", False, False), "cohere": ("paired", True, False), "glm": ("doubled", True, True),
    "ernie4_5": ("doubled", True, False), "nemotron": ("doubled", False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_families(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    layout, interleaved, partial = FUNCTIONS[name]
    stock = module.apply_rotary_pos_emb
    cases, widens = rope._cases(stock)
    assert cases == {
        (layout, head, p): interleaved for head in (1, 2) for p in ((False, True) if partial else (False,))
    }
    ours = rope._rotation(stock, cases, widens)
    angles = torch.randn(1, 16, 12 if partial else 16)
    for dtype, table, head in (
        (torch.float32, torch.float32, 1), (torch.float32, torch.float32, 2), (torch.float64, torch.float32, 1),
        (torch.bfloat16, torch.float32, 1), (torch.bfloat16, torch.bfloat16, 2),
    ):  # fmt: skip
        tables = []
        for half in (angles.cos().to(table), angles.sin().to(table)):
            tables.append(half.repeat(1, 1, 2) if layout == "doubled" else half.repeat_interleave(2, -1))
            setattr(tables[-1], rope._TABLE, (layout, half.float()))
        size = (2, 3, 16, 32) if head == 1 else (2, 16, 3, 32)
        values, dy = [torch.randn(size).to(dtype) for _ in range(2)], [torch.randn(size).to(dtype) for _ in range(2)]

        def run(function: Any, to: torch.dtype | None = None, head: int = head) -> list[Tensor]:
            q, k = (v.to(to).requires_grad_() for v in values)  # noqa: B023
            found = function(q, k, *(t.to(to) if to else t for t in tables), unsqueeze_dim=head)  # noqa: B023
            upstream = [d.to(t.dtype) for d, t in zip(dy, found, strict=True)]  # noqa: B023
            return [*found, *torch.autograd.grad(found, (q, k), upstream)]

        expected, found = run(stock), run(ours)
        if dtype is torch.bfloat16:
            exact = run(stock, torch.float64)
            for f, s, e in zip(found, expected, exact, strict=True):
                assert f.dtype == s.dtype and (f - e).abs().mean() <= 1.02 * (s - e).abs().mean()
        else:
            assert_close(found, expected, 2e-6)


def test_tables_from_elsewhere_take_the_stock_function(calls: list[Tensor]) -> None:
    model = zoo.build("llama")
    patch(model)
    layer, x = model.get_submodule("model.layers.0.self_attn"), torch.randn(1, 5, 32)
    cos, sin = torch.randn(2, 1, 5, 8)  # no angle is there twice
    calls.clear()
    ours = layer(x, position_embeddings=(cos, sin))[0]
    restore(layer)
    assert torch.equal(ours, layer(x, position_embeddings=(cos, sin))[0]) and not calls


def test_generation_copies_and_pickle(calls: list[Tensor]) -> None:
    model, tokens = zoo.build("qwen3").eval(), zoo.inputs("qwen3", "left", labels=False)
    tokens.pop("position_ids")
    stock = model.generate(**tokens, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    patch(model)
    for double in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert swapped(double.get_submodule("model.layers.0.self_attn")) is rope.RotaryAttention
        assert torch.equal(double.generate(**tokens, max_new_tokens=4, do_sample=False), stock) and len(calls) >= 8


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(calls: list[Tensor]) -> None:
    model, batch = zoo.build("llama").train(), zoo.inputs("llama")
    stock = run(model, batch)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    patch(model)
    calls.clear()
    assert_close(run(model, batch), stock, 1e-5)
    assert len(calls) == 4  # each layer once more in the backward


class UsersRotation(modeling_llama.LlamaAttention):
    forward = modeling_llama.LlamaAttention.forward


class UsersTable(modeling_llama.LlamaRotaryEmbedding):
    pass


def test_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    model.get_submodule("model.layers.0.self_attn").__class__ = UsersRotation
    report = patch(model)
    assert len(report.replaced) == 1 and "tests.hf.test_rope's own" in report.left[0].reason

    model = zoo.build("llama")
    model.get_submodule("model.rotary_emb").__class__ = UsersTable
    report = patch(model)
    assert not report.replaced and all("no rotary embedding" in entry.reason for entry in report.left)

    def other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return q * cos.unsqueeze(unsqueeze_dim), k

    rope._rebind.cache_clear()
    with monkeypatch.context() as inside:
        inside.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        report = patch(zoo.build("llama"))
    rope._rebind.cache_clear()
    assert not report.replaced and all("not the rotation" in entry.reason for entry in report.left)


def test_a_model_without_rotary_embedding() -> None:
    for name in ("gpt2", "bert", "t5"):
        assert not patch(zoo.build(name)).entries


def test_buffers_and_randomness_are_left() -> None:
    model = zoo.build("gemma3")
    state, before = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
