"""Text to token ids and back: byte-level BPE, characters, bytes. Each is one tokenizer.json in a folder."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.files import atomic_file

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """decode(encode(text)) == text for every text it accepts.

    Attributes:
        kind: "bpe", "char" or "byte".
        vocab_size: ids are 0 .. vocab_size - 1.
        separator: id put between documents, or None.
    """

    kind: str
    vocab_size: int
    separator: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not whole UTF-8 characters become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """What is written to tokenizer.json."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell this tokenizer from any other."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json into the folder."""
        path = Path(folder) / FILE
        with atomic_file(path) as file:
            file.write(self.to_json().encode())
        return path

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Ids of all documents in a row, each followed by the separator if there is one. (N,) uint32."""
        rows = self._encode_batch(documents)
        tail = [] if self.separator is None else [self.separator]
        parts = [np.asarray(list(row) + tail, dtype=np.uint32) for row in rows]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def _encode_batch(self, documents: Sequence[str]) -> Iterable[Sequence[int]]:
        return [self.encode(text) for text in documents]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "fastlm-byte"})


class CharTokenizer(Tokenizer):
    """One id per character seen in the corpus, in order of code point.

    Args:
        characters: the alphabet, each character once.
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError(f"characters must be one or more different characters, got {characters[:40]!r}")
        self.characters = characters
        self.vocab_size = len(characters)
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, documents: Iterable[str]) -> CharTokenizer:
        """The alphabet of the documents."""
        found: set[str] = set()
        for text in documents:
            found.update(text)
        return cls("".join(sorted(found)))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is not among the {self.vocab_size} characters this tokenizer knows: "
                f"{self.characters[:100]!r}; the byte and bpe tokenizers take any text"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"type": "fastlm-char", "characters": self.characters})


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2).

    The file is Hugging Face's tokenizer.json, which transformers and others read as it is. Text that happens to
    contain the separator's name stays text.
    """

    kind = "bpe"

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner.encode_special_tokens = True  # else "<|endoftext|>" in a text would not come back as it went in
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.separator = inner.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = 4096) -> BPETokenizer:
        """Learn merges from the documents until there are vocab_size ids (at least 257: the bytes, the separator)."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 for byte-level BPE, got {vocab_size}")
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        return str(self._inner.to_str(pretty=True))

    def _encode_batch(self, documents: Sequence[str]) -> Iterable[Sequence[int]]:
        for start in range(0, len(documents), 256):
            for found in self._inner.encode_batch(list(documents[start : start + 256]), add_special_tokens=False):
                yield found.ids


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises:
        FileNotFoundError: no tokenizer.json there.
        ValueError: it is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint or data folder holds its {FILE}")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        kind = content.get("type") if isinstance(content, dict) else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if kind == "fastlm-byte":
        return ByteTokenizer()
    if kind == "fastlm-char":
        return CharTokenizer(content["characters"])
    from tokenizers import Tokenizer as Inner

    try:
        return BPETokenizer(Inner.from_str(text))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from None
