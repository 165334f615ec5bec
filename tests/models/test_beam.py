"""Beam search against every sequence there is, and what its options mean."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastlm.models._beam import beam_search, lengths

CPU = torch.device("cpu")


class Markov:
    """A model whose next token depends on the source, on the last token and on how many there are."""

    def __init__(self, batch: int, beams: int, vocab: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(batch, steps, vocab, vocab, generator=generator)
        self.beams = beams

    def __call__(self, seen: Tensor, rows: Tensor) -> Tensor:
        source = torch.arange(len(seen)) // self.beams
        assert (rows // self.beams == source).all(), "a prefix continues one of its own source"
        return self.logits[source, seen.shape[1] - 1, seen[:, -1]]

    def log_probability(self, source: int, sequence: tuple[int, ...], bos: int) -> float:
        total, last = 0.0, bos
        for i, token in enumerate(sequence):
            total += self.logits[source, i, last].log_softmax(-1)[token].item()
            last = token
        return total


def every_sequence(vocab: int, steps: int, eos: int) -> list[tuple[int, ...]]:
    others = [token for token in range(vocab) if token != eos]
    ended = [(*s, eos) for n in range(steps) for s in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=steps))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0, -0.5])
def test_enough_beams_find_the_best_of_all(length_penalty: float) -> None:
    """With as many beams as prefixes nothing is ever dropped: the search is exhaustive, and its early end is exact."""
    vocab, steps, eos, bos = 3, 4, 2, 0
    beams, batch = vocab**3, 6
    for seed in range(5):
        model = Markov(batch, beams, vocab, steps, seed)
        found = beam_search(model, batch, beams, bos, eos, None, steps, length_penalty, CPU)
        assert found.shape[1] == lengths(found, eos).max()
        for source in range(batch):
            best = max(
                every_sequence(vocab, steps, eos),
                key=lambda s: model.log_probability(source, s, bos) / len(s) ** length_penalty,
            )
            assert tuple(found[source].tolist()) == best + (eos,) * (found.shape[1] - len(best))


def test_a_source_does_not_depend_on_the_others() -> None:
    model = Markov(5, 3, 6, 7, 1)
    together = beam_search(model, 5, 3, 0, 5, None, 7, 1.0, CPU)
    for source in range(5):
        alone = Markov(1, 3, 6, 7, 1)
        alone.logits = model.logits[source : source + 1]
        found = beam_search(alone, 1, 3, 0, 5, None, 7, 1.0, CPU)[0]
        assert found.tolist() == together[source, : len(found)].tolist()
        assert (together[source, len(found) :] == 5).all()


def test_it_ends_when_nothing_better_can_come() -> None:
    calls = []

    def step(seen: Tensor, rows: Tensor) -> Tensor:
        calls.append(seen.shape[1])
        logits = torch.zeros(len(seen), 5)
        logits[:, 4] = 9.0 if seen.shape[1] == 3 else -9.0
        return logits

    found = beam_search(step, 2, 2, 0, 4, None, 50, 0.0, CPU)
    assert found.shape == (2, 3) and (found[:, 2] == 4).all()
    assert calls == [1, 2, 3]


def test_pad_is_never_written() -> None:
    """And keeps its probability: pad=1 is the likeliest, and what others have left decides."""
    model = Markov(5, 16, 4, 5, 2)
    model.logits[:, :, :, 1] += 4.0
    found = beam_search(model, 5, 16, 0, 3, 1, 5, 1.0, CPU)
    for source in range(5):
        without = [sequence for sequence in every_sequence(4, 5, 3) if 1 not in sequence]
        best = max(without, key=lambda s: model.log_probability(source, s, 0) / len(s))
        assert tuple(found[source].tolist()) == best + (3,) * (found.shape[1] - len(best))


def test_impossible_tokens() -> None:
    """-inf among the logits: fewer continuations than beams."""

    def step(seen: Tensor, rows: Tensor) -> Tensor:
        logits = torch.full((len(seen), 4), float("-inf"))
        logits[:, seen.shape[1] % 3] = 0.0
        if seen.shape[1] == 4:
            logits[:, 3] = 1.0
        return logits

    assert beam_search(step, 1, 4, 0, 3, None, 9, 1.0, CPU).tolist() == [[1, 2, 0, 3]]
    assert beam_search(step, 1, 4, 0, 3, None, 2, 1.0, CPU).tolist() == [[1, 2]]
