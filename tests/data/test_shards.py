"""Token shards: what is written is read back, and damage never goes unnoticed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from fastlm.data import open_shard, write_shard

MARK = "0123456789abcdef" * 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.tokens", np.arange(1000) % 50, 50, MARK)


@pytest.mark.parametrize(("vocab", "itemsize"), [(50, 2), (65536, 2), (65537, 4), (200_000, 4)])
@pytest.mark.parametrize("count", [0, 1, 1001])
def test_round_trip(tmp_path: Path, vocab: int, itemsize: int, count: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab, count)
    shard = open_shard(write_shard(tmp_path / "x.tokens", tokens, vocab, MARK), vocab, MARK)
    assert shard.tokens.dtype.itemsize == itemsize and len(shard) == count
    assert (shard.tokens == tokens).all() and shard.vocab_size == vocab and shard.tokenizer == MARK
    assert (tmp_path / "x.tokens").stat().st_size == 64 + count * itemsize
    assert os.listdir(tmp_path) == ["x.tokens"]


@pytest.mark.parametrize("size", [0, 3, 8, 40, 63, 64, 100, 2063])
def test_truncated(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.tokens is (truncated|not a token shard)"):
        open_shard(path)


def test_every_damaged_byte_of_the_header_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for i in range(64):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"a\.tokens"):
            open_shard(path)


def test_damaged_tokens_are_noticed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum of its 1000 tokens"):
        open_shard(path)
    assert len(open_shard(path, verify=False)) == 1000


def test_longer_than_promised(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(ValueError, match="2066 bytes, its header promises 2064"):
        open_shard(path)


def test_another_vocabulary_or_tokenizer(path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50, not 60"):
        open_shard(path, 60)
    with pytest.raises(ValueError, match=r"tokenizer 0123.*, not ffff"):
        open_shard(path, 50, "f" * 32)


def test_missing_and_foreign(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.tokens does not exist"):
        open_shard(tmp_path / "no.tokens")
    (tmp_path / "text").write_text("just some text that is longer than a header of sixty-four bytes is, surely")
    with pytest.raises(ValueError, match="is not a token shard: it starts with b'just som'"):
        open_shard(tmp_path / "text")


def test_bad_tokens_write_nothing(tmp_path: Path) -> None:
    for tokens, what in (
        (np.array([1, 50]), "0 .. 49, got 1 .. 50"),
        (np.array([-1]), "got -1"),
        (np.array([[1]]), "shape"),
        (np.array([1.0]), "float64"),
    ):
        with pytest.raises(ValueError, match=what.replace(".", r"\.")):
            write_shard(tmp_path / "x.tokens", tokens, 50, MARK)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, np.zeros(5, dtype=int), 50, MARK)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.tokens"]
