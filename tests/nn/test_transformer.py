"""TransformerBlock in one call: the numbers of its layers, and the layers themselves where somebody would notice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.nn import KVCache, RotaryEmbedding, TransformerBlock, _one_call

STYLES = {
    "gpt2": {"activation": "gelu_tanh"},
    "gpt2, dropout": {"dropout": 0.2},
    "llama": {"activation": "swiglu", "norm": "rms", "kv_heads": 2, "bias": False},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call of the whole block."""
    found: list[bool] = []
    whole = _one_call.transformer_block

    def noted(*args, **kwargs):
        found.append(True)
        return whole(*args, **kwargs)

    monkeypatch.setattr(_one_call, "transformer_block", noted)
    return found


def run(block: TransformerBlock, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    y = block(leaf, rope)
    y.backward(torch.randn_like(y))
    return [y.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_same_numbers_as_the_layers(
    style: str, precision: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    block, x = TransformerBlock(32, 4, dtype=dtype, **STYLES[style]), torch.randn(2, 13, 32).to(dtype)
    rope = RotaryEmbedding(8)(13) if style == "llama" else None
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        whole = run(block, x, rope)
        assert calls == [True]
        monkeypatch.setattr(_one_call, "takes", lambda x: False)
        layers = run(block, x, rope)
    assert calls == [True]
    assert torch.equal(whole[0], layers[0])
    for a, b in zip(whole[1:], layers[1:], strict=True):
        assert a.dtype is b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-6 if precision == "float32" else 2e-2)


def hooked(block: TransformerBlock) -> None:
    block.mlp.up.register_forward_hook(lambda *_: None)


def frozen(block: TransformerBlock) -> None:
    block.attention.out.weight.requires_grad_(False)


def patched(block: TransformerBlock) -> None:
    block.attention.forward = block.attention.forward  # type: ignore[method-assign]


def parametrized(block: TransformerBlock) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.mlp.down)


def replaced(block: TransformerBlock) -> None:
    block.norm2 = torch.nn.LayerNorm(32)  # type: ignore[assignment]


def in_float64(block: TransformerBlock) -> None:
    block.double()


@pytest.mark.parametrize(
    "change", [hooked, frozen, patched, parametrized, replaced, in_float64], ids=lambda f: f.__name__
)
def test_layers_run_one_by_one(change: Callable[[TransformerBlock], None], calls: list[bool]) -> None:
    block = TransformerBlock(32, 4)
    change(block)
    run(block, torch.randn(2, 5, 32).to(block.mlp.up.weight.dtype))
    assert calls == []


def test_other_backends_caches_and_compiled_graphs_take_the_layers(calls: list[bool]) -> None:
    block, x = TransformerBlock(32, 4), torch.randn(2, 5, 32)
    with fastlm.use_backend("reference"):
        run(block, x)
    with torch.no_grad():
        block(x, None, KVCache(8))
    torch._dynamo.reset()
    torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert calls == []
    run(block, x)
    assert calls == [True]


def test_under_checkpointing(calls: list[bool]) -> None:
    block, x = TransformerBlock(32, 4, dropout=0.1), torch.randn(2, 5, 32)
    expected = run(block, x)
    torch.manual_seed(1)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(block, leaf, use_reentrant=False)
    y.backward(torch.randn_like(y))
    assert torch.equal(leaf.grad, expected[1]) and len(calls) == 3


def test_a_parameter_changed_between_forward_and_backward_is_noticed() -> None:
    block, x = TransformerBlock(32, 4), torch.randn(2, 5, 32)
    y = block(x)
    with torch.no_grad():
        block.mlp.down.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
