"""Ragged rows on disk, and the batches they come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.data import write_shard
from fastlm.data.rows import POOL, BucketedRows, SortedRows, open_rows, pad_rows, real_positions, write_rows

MARK = "0" * 32


def test_rows_on_disk(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [9], [4, 4]]
    write_rows(tmp_path, "train", rows, 10, MARK)
    read = open_rows(tmp_path, "train", 10, MARK)
    assert len(read) == 4 and [row.tolist() for row in map(read.__getitem__, range(4))] == rows
    write_shard(tmp_path / "train.lengths", np.array([3, 0, 1, 1]), 4, MARK)
    with pytest.raises(ValueError, match=r"train.lengths counts 5 tokens, train.tokens beside it has 6"):
        open_rows(tmp_path, "train", 10, MARK)
    with pytest.raises(ValueError, match="was written with tokenizer"):
        open_rows(tmp_path, "train", 10, "1" * 32)
    (tmp_path / "train.lengths").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.lengths"):
        open_rows(tmp_path, "train", 10, MARK)


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", [], 10, MARK)
    assert len(open_rows(tmp_path, "train", 10, MARK)) == 0
    with pytest.raises(ValueError, match="the training data has no rows"):
        BucketedRows(np.empty(0), 2, 0)
    with pytest.raises(ValueError, match="the validation data has no rows"):
        SortedRows(np.empty(0), 2)


def test_every_row_once_an_epoch_and_another_order_in_the_next() -> None:
    lengths = np.random.randint(1, 100, 1001)
    batches = BucketedRows(lengths, 8, seed=3)
    epochs = [[batches[e * batches.per_epoch + i] for i in range(batches.per_epoch)] for e in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).tolist()) == list(range(1001))
        assert sorted({len(batch) for batch in epoch}) == [1, 8]
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    assert not np.array_equal(batches[0], BucketedRows(lengths, 8, seed=4)[0])


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    lengths = np.random.randint(1, 100, 300)
    one, other = BucketedRows(lengths, 7, seed=3), BucketedRows(lengths, 7, seed=3)
    numbers = [200, 0, 44, 43, 200]
    assert all(np.array_equal(one[i], BucketedRows(lengths, 7, seed=3)[i]) for i in numbers)
    assert all(np.array_equal(one[i], other[i]) for i in range(60))


def test_rows_of_like_length_stand_together_and_batches_do_not_come_by_length() -> None:
    lengths = np.random.randint(1, 1000, POOL * 16)
    batches = BucketedRows(lengths, 16, seed=0)
    spread = [np.ptp(lengths[batches[i]]) for i in range(POOL)]
    assert np.mean(spread) < 30  # of 1000; in a random order about 880
    means = [lengths[batches[i]].mean() for i in range(POOL)]
    assert abs(np.corrcoef(means, range(POOL))[0, 1]) < 0.4


def test_validation_rows_come_once_and_in_order() -> None:
    rows = SortedRows(np.array([5, 1, 3, 1, 2]), 2)
    assert [rows[i].tolist() for i in range(len(rows))] == [[1, 3], [4, 2], [0]]
    with pytest.raises(IndexError, match=r"0 \.\. 2, got 3"):
        rows[3]
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        SortedRows(np.array([1]), 0)


def test_padding() -> None:
    rows = [np.array([1, 2, 3], dtype=np.uint16), [7]]
    assert torch.equal(pad_rows(rows, -100), torch.tensor([[1, 2, 3], [7, -100, -100]]))
    assert torch.equal(real_positions(rows), torch.tensor([[True, True, True], [True, False, False]]))
