"""States of fewer bits train as well as float32 ones: the loss they reach. test_adam has the deviation of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastlm import optim

V, WIDTH, STEPS = 64, 96, 400


def text(length: int) -> Tensor:
    """Tokens that depend on the two before them: every pair has four successors, of unequal chances."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(V, (V, V, 4), generator=generator)
    choice = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.05]), length, replacement=True, generator=generator)
    tokens = [1, 2]
    for c in choice.tolist():
        tokens.append(int(successors[tokens[-2], tokens[-1], c]))
    return torch.tensor(tokens)


def train(tokens: Tensor, **options: object) -> float:
    """Mean loss of the last tenth of the steps of a model of trigrams."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(V, WIDTH), nn.Flatten(), nn.Linear(2 * WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, V)
    )
    optimizer = optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.1, **options)  # type: ignore[arg-type]
    pairs, targets = tokens.unfold(0, 2, 1)[:-1], tokens[2:]
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        batch = torch.randint(len(targets), (256,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(pairs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-STEPS // 10 :]) / (STEPS // 10)


def test_8_bit_states_reach_the_loss_of_float32_ones() -> None:
    tokens = text(20_000)
    exact, coded = train(tokens), train(tokens, state_bits=8)
    assert exact < 3.0 < torch.tensor(float(V)).log()  # it has learnt
    assert coded == pytest.approx(exact, rel=0.01)
