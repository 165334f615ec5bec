"""CausalLM on every backend beside the same weights in plain PyTorch: loss, gradients, twenty steps of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

import fastlm
from bench.plain_gpt import PlainGPT
from fastlm import native
from fastlm.models import CausalLM, CausalLMConfig
from tests.ops.harness import BACKWARD, FORWARD, each_backend

SIZE = {"vocab_size": 211, "context": 40, "layers": 3, "heads": 4, "width": 64}
STYLES = {
    "gpt2": CausalLMConfig.gpt2(**SIZE),
    "gpt2, gelu, untied": CausalLMConfig.gpt2(**SIZE, activation="gelu", tied=False, bias=False),
    "llama": CausalLMConfig.llama(**SIZE, kv_heads=2),
    "llama, geglu, tied": CausalLMConfig.llama(**SIZE, activation="geglu", tied=True),
}
each_style = pytest.mark.parametrize("style", STYLES)


@contextmanager
def choosing(backend: str) -> Iterator[None]:
    """The reference, or the automatic choice with this instruction set: torch's own parts have no backend to force."""
    name, _, isa = backend.partition("-")
    if isa:
        native.set_isa(isa)
    with fastlm.use_backend(None if isa else name):
        yield


def models(style: str) -> tuple[CausalLM, PlainGPT]:
    ours, plain = CausalLM(STYLES[style]), PlainGPT(STYLES[style])
    for p in ours.parameters():  # larger than at the start, so that every part has a say
        p.data.add_(torch.randn_like(p) * 0.05)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch(generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Counting from a random number: something 20 steps can learn."""
    tokens = (torch.randint(211, (3, 1), generator=generator) + torch.arange(41)) % 211
    tokens, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :7] = -100
    return tokens, targets


def assert_as_accurate(what: str, actual: Tensor, oracle: Tensor, eager: Tensor, factor: float) -> None:
    """The accuracy rule on whole vectors: past many layers the largest error is a matter of chance."""
    assert actual.dtype is eager.dtype and actual.shape == oracle.shape
    error, eager_error = ((t.double() - oracle).norm().item() for t in (actual, eager))
    allowed = factor * eager_error + 4 * torch.finfo(actual.dtype).eps * oracle.norm().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (eager {eager_error:.3e})"


@each_backend
@each_style
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_loss_and_gradients(backend: str, style: str, precision: str) -> None:
    ours, plain = models(style)
    (tokens, targets), oracle = batch(), PlainGPT(STYLES[style])
    if precision == "bfloat16":
        ours.bfloat16(), plain.bfloat16()
    oracle.double().load_state_dict(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        with choosing(backend):
            losses = ours(tokens, targets, reduction="none").loss
            ours(tokens, targets).loss.backward()
        eager = plain(tokens, targets, reduction="none")
        plain(tokens, targets).backward()
    exact = oracle(tokens, targets, reduction="none")
    oracle(tokens, targets).backward()
    assert_as_accurate("losses", losses.detach(), exact.detach(), eager.detach().to(losses.dtype), FORWARD)
    for name, p in ours.named_parameters():
        q, r = plain.get_parameter(name), oracle.get_parameter(name)
        assert p.grad is not None and q.grad is not None and r.grad is not None
        assert_as_accurate(name, p.grad, r.grad, q.grad, BACKWARD)


@each_backend
@each_style
def test_twenty_steps_of_training(backend: str, style: str) -> None:
    ours, plain = models(style)
    losses: list[list[float]] = [[], []]
    for forward, model, history in zip((lambda *b: ours(*b).loss, plain), (ours, plain), losses, strict=True):
        generator = torch.Generator().manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        with choosing(backend):
            for _ in range(20):
                loss = forward(*batch(generator))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(loss.item())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.2
