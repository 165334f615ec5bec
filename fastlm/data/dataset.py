"""A folder with everything a run reads: tokenizer.json, train.tokens, validation.tokens, dataset.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastlm.data.batches import RandomWindows, SequentialWindows
from fastlm.data.corpus import Corpus
from fastlm.data.files import atomic_file
from fastlm.data.shards import Shard, open_shard, write_shard
from fastlm.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

FILE = "dataset.json"
Opened = TypeVar("Opened", bound="Dataset")


@dataclass(frozen=True)
class Dataset:
    """Tokens of both sides of a corpus, and the tokenizer that made them.

    Attributes:
        info: source, licence, sha256, python, tokenizer kind, bytes and tokens of each side.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Shard
    validation: Shard
    info: dict[str, Any]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the validation text, what bits per byte are counted over."""
        return int(self.info["validation_bytes"])

    def train_batches(self, batch: int, seed: int, context: int) -> RandomWindows:
        """Windows of the training text, drawn anew for every batch."""
        return RandomWindows(self.train.tokens, context, batch, seed)

    def validation_batches(self, batch: int, context: int) -> SequentialWindows:
        """The whole validation text, every token predicted once."""
        return SequentialWindows(self.validation.tokens, context, batch)

    @classmethod
    def open(cls: type[Opened], folder: str | Path) -> Opened:
        """Open what `prepare` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or shards and tokenizer do not belong together.
        """
        folder = Path(folder)
        info = read_info(folder)
        tokenizer = load_tokenizer(folder)
        shards = [
            open_shard(folder / f"{side}.tokens", tokenizer.vocab_size, tokenizer.fingerprint)
            for side in ("train", "validation")
        ]
        return cls(folder, tokenizer, shards[0], shards[1], info)


def read_info(folder: Path) -> dict[str, Any]:
    """What dataset.json says.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a data folder")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(info, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(info).__name__}")
    return info


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write dataset.json; the last file of a folder, so that what has one is whole."""
    with atomic_file(folder / FILE) as file:
        file.write((json.dumps(info, indent=2) + "\n").encode())


def prepare(
    corpus: Corpus,
    folder: str | Path,
    tokenizer: str | Tokenizer = "bpe",
    vocab_size: int = 4096,
    specials: Sequence[str] = (),
) -> Dataset:
    """Train a tokenizer on the training documents, write both sides as shards, open them.

    Args:
        tokenizer, vocab_size, specials: as make_tokenizer.
    """
    folder = Path(folder)
    made = make_tokenizer(tokenizer, corpus.train, corpus.validation, vocab_size, specials)
    sizes = corpus.bytes
    info = {
        "source": corpus.source,
        "licence": corpus.licence,
        "sha256": corpus.sha256,
        "python": platform.python_version(),
        "tokenizer": made.kind,
        "vocab_size": made.vocab_size,
        "train_files": len(corpus.train),
        "validation_files": len(corpus.validation),
        "train_bytes": sizes[0],
        "validation_bytes": sizes[1],
    }
    made.save(folder)
    for side, documents in (("train", corpus.train), ("validation", corpus.validation)):
        tokens = made.encode_documents(documents)
        info[f"{side}_tokens"] = len(tokens)
        write_shard(folder / f"{side}.tokens", tokens, made.vocab_size, made.fingerprint)
    write_info(folder, info)
    return Dataset.open(folder)
