"""Batches by number: pure, in range, complete."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlm.data import IGNORE, RandomWindows, SequentialWindows

TOKENS = np.arange(1000, dtype=np.uint16)


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    a, b = RandomWindows(TOKENS, 16, 4, seed=7), RandomWindows(TOKENS, 16, 4, seed=7)
    late = b[1000]  # without the thousand before it
    for i in range(1000):
        a[i]
    assert all(torch.equal(a[1000][name], late[name]) for name in late)
    assert not torch.equal(a[0]["tokens"], a[1]["tokens"])
    assert not torch.equal(a[0]["tokens"], RandomWindows(TOKENS, 16, 4, seed=8)[0]["tokens"])
    state = np.random.get_state()[1]
    a[3]
    assert (np.random.get_state()[1] == state).all(), "a batch draws from nobody else's generator"


def test_targets_are_the_next_tokens() -> None:
    batch = RandomWindows(TOKENS, 16, 4, seed=0)[0]
    x, y = batch["tokens"], batch["targets"]
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and x.is_contiguous() and y.is_contiguous()


def test_every_start_is_drawn() -> None:
    windows = RandomWindows(TOKENS[:20], 16, 8, seed=0)
    starts = {int(s) for i in range(50) for s in windows[i]["tokens"][:, 0]}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("count", [2, 16, 17, 64, 65, 66, 129, 1000])
def test_sequential_predicts_every_token_once(count: int) -> None:
    windows = SequentialWindows(TOKENS[:count], 16, 4)
    found: list[int] = []
    for i in range(len(windows)):
        x, y = windows[i]["tokens"], windows[i]["targets"]
        assert x.shape == y.shape == (4, 16)
        seen = y != IGNORE
        assert torch.equal(x[seen] + 1, y[seen])
        found += y[seen].tolist()
    assert found == list(range(1, count)) and windows.targets == count - 1
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_errors() -> None:
    with pytest.raises(ValueError, match="has 16 tokens; a context of 16 needs at least 17"):
        RandomWindows(TOKENS[:16], 16, 4, seed=0)
    with pytest.raises(ValueError, match="validation text has 1 tokens"):
        SequentialWindows(TOKENS[:1], 16, 4)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        SequentialWindows(TOKENS, 0, 4)
