"""Rows of unequal length: on disk as two shards, in batches of like length. Batch i is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.data.shards import open_shard, write_shard

POOL = 64
"""Batches whose rows are sorted together: enough that they are of like length, few enough that the order is random."""


class Rows:
    """Rows of ids, one behind the other.

    Args:
        ids: (N,) integers.
        lengths: (R,) integers that add up to N.
    """

    def __init__(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.ids = ids
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        """(lengths[row],), a view."""
        end = self._ends[row]
        return self.ids[end - self.lengths[row] : end]


def write_rows(folder: Path, name: str, rows: Sequence[Sequence[int]], vocab_size: int, tokenizer: str) -> None:
    """Writes name.tokens, all ids, and name.lengths; both are shards.

    Args:
        vocab_size: every id is below it.
        tokenizer: Tokenizer.fingerprint.
    """
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=int(lengths.sum()))
    write_shard(folder / f"{name}.tokens", ids, vocab_size, tokenizer)
    write_shard(folder / f"{name}.lengths", lengths, int(lengths.max(initial=0)) + 1, tokenizer)


def open_rows(folder: Path, name: str, vocab_size: int, tokenizer: str) -> Rows:
    """The rows that write_rows wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, of another vocabulary or tokenizer, or the two do not belong together.
    """
    ids = open_shard(folder / f"{name}.tokens", vocab_size, tokenizer).tokens
    shard = open_shard(folder / f"{name}.lengths", None, tokenizer)
    total = int(shard.tokens.sum(dtype=np.int64))
    if total != len(ids):
        raise ValueError(f"{shard.path} counts {total} tokens, {name}.tokens beside it has {len(ids)}")
    return Rows(ids, shard.tokens)


class BucketedRows:
    """Which rows make up a batch: in every epoch each row once, in a new order, with rows of like length together.

    An epoch is a random order of all rows. 64 batches of it at a time are sorted by length and cut into batches, which
    come in a random order. The draws come from Philox with the seed as key and the epoch as counter.

    Args:
        lengths: (R,), R at least 1.
        batch: rows a batch, B; the last of an epoch may have fewer.
        seed: another seed, another order.
    """

    def __init__(self, lengths: np.ndarray, batch: int, seed: int) -> None:
        _check(lengths, batch, "training")
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.per_epoch = -(-len(lengths) // batch)
        self._epoch, self._batches = -1, [np.empty(0, dtype=np.int64)]

    def __getitem__(self, number: int) -> np.ndarray:
        """(B,), the rows of batch `number`, which counts on from epoch to epoch."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches[place]

    def _order(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 1, epoch]))
        order = generator.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), POOL * self.batch):
            pool = order[start : start + POOL * self.batch]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        return [batches[i] for i in generator.permutation(len(batches))]


class SortedRows:
    """Every row once, from the shortest to the longest, B a batch and what is left in the last."""

    def __init__(self, lengths: np.ndarray, batch: int) -> None:
        _check(lengths, batch, "validation")
        self.batch = batch
        self.order = np.argsort(lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"batch must be in 0 .. {len(self) - 1}, got {number}")
        return self.order[number * self.batch : (number + 1) * self.batch]


def _check(lengths: np.ndarray, batch: int, what: str) -> None:
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not len(lengths):
        raise ValueError(f"the {what} data has no rows")


def pad_rows(rows: Sequence[np.ndarray | Sequence[int]], value: int) -> Tensor:
    """(B, S) int64, S the longest row's length; the others are filled up with value."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def real_positions(rows: Sequence[np.ndarray | Sequence[int]]) -> Tensor:
    """(B, S) bool beside pad_rows: True where a row has an id, False where it was filled up."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]
