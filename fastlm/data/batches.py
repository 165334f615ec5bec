"""Batches of windows. Batch i is a pure function of (seed, i): to resume is to go on counting.

A batch is a dict of tensors, keyword by keyword what the model's forward takes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that has none."""


def _check(tokens: np.ndarray, context: int, batch: int, what: str) -> None:
    if context < 1 or batch < 1:
        raise ValueError(f"context and batch must be at least 1, got {context} and {batch}")
    if len(tokens) < 2:
        raise ValueError(f"the {what} text has {len(tokens)} tokens; at least 2 are needed")


class RandomWindows:
    """Windows that start anywhere, drawn anew for every batch.

    The draws come from Philox, a generator with a counter (Salmon et al. 2011): the key is the seed, the counter the
    number of the batch. No state is kept and none has to be saved.

    Args:
        tokens: (N,) ids.
        context: tokens per window, T. Must be below N.
        batch: windows per batch, B.
        seed: another seed, another order.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int) -> None:
        _check(tokens, context, batch, "training")
        if len(tokens) <= context:
            raise ValueError(
                f"the training text has {len(tokens)} tokens; a context of {context} needs at least {context + 1}"
            )
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self._steps = np.arange(context + 1)

    def starts(self, number: int) -> np.ndarray:
        """(B,), where the windows of batch `number` begin."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, number]))
        return generator.integers(0, len(self.tokens) - self.context, size=self.batch)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """tokens and targets of batch `number`, each (B, T) int64; targets are the next tokens."""
        starts = self.starts(number)
        window = torch.from_numpy(self.tokens[starts[:, None] + self._steps].astype(np.int64))
        return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


class SequentialWindows:
    """Every token of a text predicted exactly once, in order, in windows that do not overlap.

    What the last window and the last batch lack is filled up with id 0 and target IGNORE, so that all batches have
    one shape.

    Args:
        tokens: (N,) ids.
        context: tokens per window, T.
        batch: windows per batch, B.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int) -> None:
        _check(tokens, context, batch, "validation")
        self.tokens, self.context, self.batch = tokens, context, batch
        self.targets = len(tokens) - 1

    def __len__(self) -> int:
        return -(-self.targets // (self.context * self.batch))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """tokens and targets of batch `number`, each (B, T) int64."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch must be in 0 .. {len(self) - 1}, got {number}")
        size = self.context * self.batch
        start = number * size
        stop = min(start + size, self.targets)
        inputs = np.zeros(size, dtype=np.int64)
        targets = np.full(size, IGNORE, dtype=np.int64)
        inputs[: stop - start] = self.tokens[start:stop]
        targets[: stop - start] = self.tokens[start + 1 : stop + 1]
        shape = (self.batch, self.context)
        return {"tokens": torch.from_numpy(inputs).view(shape), "targets": torch.from_numpy(targets).view(shape)}
