"""A prepared folder: complete, consistent, checked when opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastlm.data import ByteTokenizer, Dataset, from_paths, prepare, write_shard


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    (tmp_path / "t.txt").write_text("some text with é in it\n" * 100)
    return prepare(from_paths([tmp_path / "t.txt"]), tmp_path / "data", "char")


def test_contents(dataset: Dataset) -> None:
    text = dataset.tokenizer.decode(np.concatenate([dataset.train.tokens, dataset.validation.tokens]).tolist())
    assert text == "some text with é in it\n" * 100
    info = json.loads((dataset.folder / "dataset.json").read_text())
    assert info == dataset.info and info["tokenizer"] == "char" and len(info["sha256"]) == 64 and info["python"]
    assert dataset.validation_bytes == 240 and info["validation_tokens"] == 230 == len(dataset.validation)


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_kinds(tmp_path: Path, kind: str) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"file number {i} holds this\n" * (i + 1))
    made = prepare(from_paths([tmp_path]), tmp_path / "data", kind, vocab_size=300)
    again = Dataset.open(tmp_path / "data")
    assert again.tokenizer.fingerprint == made.tokenizer.fingerprint and (again.train.tokens == made.train.tokens).all()


def test_errors(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of bpe, word, char, byte, got 'letters'"):
        prepare(from_paths([tmp_path / "t.txt"]), tmp_path / "other", "letters")
    with pytest.raises(FileNotFoundError, match="is not a data folder"):
        Dataset.open(tmp_path)
    other = ByteTokenizer()
    write_shard(dataset.folder / "validation.tokens", np.zeros(9, dtype=int), other.vocab_size, other.fingerprint)
    with pytest.raises(ValueError, match=r"validation\.tokens was written for a vocabulary of 256, not 13"):
        Dataset.open(dataset.folder)
    (dataset.folder / "train.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tokens does not exist"):
        Dataset.open(dataset.folder)
