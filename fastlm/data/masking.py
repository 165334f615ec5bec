"""Text whose words are hidden in part, to be guessed from both sides (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.data.batches import IGNORE
from fastlm.data.corpus import Corpus
from fastlm.data.dataset import Dataset, prepare
from fastlm.data.tokenizer import CLS, ENCODER_SPECIALS, MASK, PAD, SEP, Tokenizer

SHARE, REPLACED, RANDOM = 0.15, 0.8, 0.1
"""Of the ids those to guess; of these those shown as [MASK], and those shown as any other id. The rest stays."""


class Masking:
    """Hides ids of windows, and frames these as [CLS] ... [SEP].

    In each window 15 % of the ids are to be guessed, at least one; ids of specials never are. Of them 80 % are shown as
    [MASK], 10 % as an id drawn from all but the specials, 10 % as they are, so that the model must keep a guess for
    every position.

    Raises:
        ValueError: the tokenizer lacks a special.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pad, self.cls, self.sep, self.mask = tokenizer.require(PAD, CLS, SEP, MASK)
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.specials.values())] = True
        self._words = np.flatnonzero(~self._special)

    def __call__(self, windows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of windows (B, T) of ids, each (B, T + 2) int64."""
        windows = windows.astype(np.int64)
        words = ~self._special[windows]
        count = np.maximum(np.rint(SHARE * words.sum(1)), 1)
        rank = np.where(words, generator.random(windows.shape), 2.0).argsort(1).argsort(1)
        guessed = (rank < count[:, None]) & words
        draw = generator.random(windows.shape)
        other = self._words[generator.integers(0, len(self._words), windows.shape)]
        shown = np.where(draw < REPLACED, self.mask, np.where(draw < REPLACED + RANDOM, other, windows))
        tokens = _frame(np.where(guessed, shown, windows), self.cls, self.sep)
        return tokens, _frame(np.where(guessed, windows, IGNORE), IGNORE, IGNORE)


def _frame(rows: np.ndarray, first: int, last: int) -> np.ndarray:
    ends = np.empty((len(rows), 1), dtype=np.int64)
    return np.concatenate([np.full_like(ends, first), rows, np.full_like(ends, last)], 1)


class RandomMaskedWindows:
    """Windows that start anywhere, with ids hidden anew, drawn for every batch from Philox as RandomWindows draws.

    Args:
        tokens: (N,) ids.
        masking: hides some of them.
        context: ids a row, [CLS] and [SEP] included; at least 3.
        batch: rows a batch, B.
        seed: another seed, other windows and other ids to guess.
    """

    def __init__(self, tokens: np.ndarray, masking: Masking, context: int, batch: int, seed: int) -> None:
        _check(context, batch)
        if len(tokens) < context - 2:
            raise ValueError(
                f"the training text has {len(tokens)} tokens; a context of {context} needs at least {context - 2}"
            )
        self.tokens, self.masking, self.context, self.batch, self.seed = tokens, masking, context, batch, seed
        self._steps = np.arange(context - 2)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """tokens and targets of batch `number`, each (B, context) int64."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, number]))
        starts = generator.integers(0, len(self.tokens) - len(self._steps) + 1, size=self.batch)
        inputs, targets = self.masking(self.tokens[starts[:, None] + self._steps], generator)
        return {"tokens": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}


class SequentialMaskedWindows:
    """A whole text in windows that do not overlap; what is hidden in a window depends on its place alone.

    The last batch may have fewer rows. Where the last window is shorter, its batch has a mask too: (B, context) bool,
    False for padding.

    Args: as RandomMaskedWindows.
    """

    def __init__(self, tokens: np.ndarray, masking: Masking, context: int, batch: int) -> None:
        _check(context, batch)
        if not len(tokens):
            raise ValueError("the validation text has no tokens; at least 1 is needed")
        self.tokens, self.masking, self.context, self.batch = tokens, masking, context, batch
        self.windows = -(-len(tokens) // (context - 2))

    def __len__(self) -> int:
        return -(-self.windows // self.batch)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """tokens and targets of batch `number`, each (B, context) int64."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch must be in 0 .. {len(self) - 1}, got {number}")
        rows = range(number * self.batch, min((number + 1) * self.batch, self.windows))
        tokens = np.full((len(rows), self.context), self.masking.pad, dtype=np.int64)
        targets = np.full((len(rows), self.context), IGNORE, dtype=np.int64)
        length = self.context
        for i, row in enumerate(rows):
            window = self.tokens[row * (self.context - 2) : (row + 1) * (self.context - 2)]
            generator = np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 0, row]))
            length = len(window) + 2
            tokens[i, :length], targets[i, :length] = (part[0] for part in self.masking(window[None], generator))
        made = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        if length < self.context:  # of the last row
            mask = torch.ones(tokens.shape, dtype=torch.bool)
            mask[-1, length:] = False
            made["mask"] = mask
        return made


def _check(context: int, batch: int) -> None:
    if context < 3 or batch < 1:
        raise ValueError(f"context must be at least 3 and batch at least 1, got {context} and {batch}")


class MaskedText(Dataset):
    """A Dataset whose batches are for MaskedLM with the head "mlm"."""

    def train_batches(self, batch: int, seed: int, context: int) -> RandomMaskedWindows:  # type: ignore[override]
        """Windows of the training text with ids hidden, drawn anew for every batch."""
        return RandomMaskedWindows(self.train.tokens, Masking(self.tokenizer), context, batch, seed)

    def validation_batches(self, batch: int, context: int) -> SequentialMaskedWindows:  # type: ignore[override]
        """The whole validation text, the same ids hidden every time."""
        return SequentialMaskedWindows(self.validation.tokens, Masking(self.tokenizer), context, batch)


def prepare_masked(
    corpus: Corpus, folder: str | Path, tokenizer: str | Tokenizer = "bpe", vocab_size: int = 4096
) -> MaskedText:
    """As prepare(), with a tokenizer that has [PAD], [CLS], [SEP] and [MASK]."""
    prepare(corpus, folder, tokenizer, vocab_size, ENCODER_SPECIALS)
    return MaskedText.open(folder)
