"""Masked text: how many ids are hidden and as what, batches by number, the whole validation text."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.data import IGNORE, ByteTokenizer, MaskedText, from_paths, prepare_masked
from fastlm.data.masking import Masking, RandomMaskedWindows, SequentialMaskedWindows
from fastlm.data.tokenizer import ENCODER_SPECIALS

TOKENIZER = ByteTokenizer(ENCODER_SPECIALS)
PAD, CLS, SEP, MASK = (TOKENIZER.specials[name] for name in ENCODER_SPECIALS)
TEXT = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)


def generator() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=7))


def test_shares_of_the_paper() -> None:
    windows = np.random.randint(0, 256, (400, 100))
    tokens, targets = Masking(TOKENIZER)(windows, generator())
    assert tokens.shape == targets.shape == (400, 102)
    assert (tokens[:, 0] == CLS).all() and (tokens[:, -1] == SEP).all()
    assert (targets[:, 0] == IGNORE).all() and (targets[:, -1] == IGNORE).all()
    inner, wanted = tokens[:, 1:-1], targets[:, 1:-1]
    guessed = wanted != IGNORE
    assert (guessed.sum(1) == 15).all() and (wanted[guessed] == windows[guessed]).all()
    assert (inner[~guessed] == windows[~guessed]).all()
    masked = (inner[guessed] == MASK).mean()
    kept = (inner[guessed] == windows[guessed]).mean()
    assert abs(masked - 0.8) < 0.02 and abs(kept - 0.1) < 0.015 and abs(1 - masked - kept - 0.1) < 0.015
    assert np.abs(guessed.mean(0) - 0.15).max() < 0.08, "every place is hidden as often"


def test_specials_are_neither_hidden_nor_drawn() -> None:
    windows = np.full((200, 20), SEP)
    windows[:, 3] = 65
    tokens, targets = Masking(TOKENIZER)(windows, generator())
    assert (targets[:, 4] == 65).all() and (targets != IGNORE).sum() == 200, "at least one in each window"
    assert set(np.unique(tokens[:, 4])) <= {MASK, *range(256)}
    assert (Masking(TOKENIZER)(np.full((2, 5), SEP), generator())[1] == IGNORE).all()


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    masking = Masking(TOKENIZER)
    batches = RandomMaskedWindows(TEXT, masking, 32, 4, seed=5)
    first = [batches[i] for i in range(4)]
    for number in (3, 0, 2):
        again = RandomMaskedWindows(TEXT, masking, 32, 4, seed=5)[number]
        assert all(torch.equal(again[name], first[number][name]) for name in ("tokens", "targets"))
    for a, b in itertools.combinations([*first, RandomMaskedWindows(TEXT, masking, 32, 4, seed=6)[0]], 2):
        assert not torch.equal(a["tokens"], b["tokens"])
    assert first[0]["tokens"].shape == (4, 32) and first[0]["tokens"].dtype is torch.int64


def test_validation_covers_the_text_once_with_fixed_masks() -> None:
    masking = Masking(TOKENIZER)
    by_batch = []
    for batch in (3, 8):
        windows = SequentialMaskedWindows(TEXT[:1003], masking, 32, batch)
        rows = [windows[i] for i in range(len(windows))]
        assert [("mask" in row) for row in rows] == [False] * (len(rows) - 1) + [True]
        mask = rows[-1]["mask"]
        assert mask[:-1].all() and mask[-1].sum() == 1003 % 30 + 2
        tokens = torch.cat([row["tokens"] for row in rows])
        targets = torch.cat([row["targets"] for row in rows])
        assert (tokens[-1][~mask[-1]] == PAD).all() and (targets[-1][~mask[-1]] == IGNORE).all()
        restored = torch.where(targets == IGNORE, tokens, targets)[:, 1:-1].flatten()
        assert torch.equal(restored[:1003], torch.from_numpy(TEXT[:1003].astype(np.int64)))
        by_batch.append((tokens, targets))
    assert all(torch.equal(a, b) for a, b in zip(*by_batch, strict=True)), "whatever the batch"


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_prepared_and_opened(tmp_path: Path, kind: str) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    made = prepare_masked(from_paths([tmp_path / "t.txt"]), tmp_path / "data", kind, 300)
    opened = MaskedText.open(tmp_path / "data")
    assert isinstance(made, MaskedText) and isinstance(opened, MaskedText)
    a, b = made.train_batches(2, 1, 16)[3], opened.train_batches(2, 1, 16)[3]
    assert all(torch.equal(a[name], b[name]) for name in a)
    mask = opened.tokenizer.specials["[MASK]"]
    assert (a["tokens"] == mask).any() and (a["tokens"] < opened.tokenizer.vocab_size).all()
    assert len(opened.validation_batches(4, 16)) > 1


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \[PAD\], \[CLS\], \[SEP\], \[MASK\], which this task needs"):
        Masking(ByteTokenizer())
    masking = Masking(TOKENIZER)
    with pytest.raises(ValueError, match="context must be at least 3 and batch at least 1, got 2 and 4"):
        RandomMaskedWindows(TEXT, masking, 2, 4, 0)
    with pytest.raises(ValueError, match="has 5 tokens; a context of 32 needs at least 30"):
        RandomMaskedWindows(TEXT[:5], masking, 32, 4, 0)
    with pytest.raises(ValueError, match="the validation text has no tokens"):
        SequentialMaskedWindows(TEXT[:0], masking, 32, 4)
    with pytest.raises(IndexError, match=r"0 \.\. 0, got 1"):
        SequentialMaskedWindows(TEXT[:5], masking, 32, 4)[1]
