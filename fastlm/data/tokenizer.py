"""Text to token ids and back: byte-level BPE, words, characters, bytes. Each is one tokenizer.json in a folder."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.files import atomic_file

FILE = "tokenizer.json"
KINDS = ("bpe", "word", "char", "byte")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
ENCODER_SPECIALS = (PAD, CLS, SEP, MASK)
"""What BERT's tokenizers call padding, the start and the end of a row, and a word that was masked."""


class Tokenizer(ABC):
    """decode(encode(text)) == text for every text it accepts; only words lose their spacing, and rare ones themselves.

    Attributes:
        kind: "bpe", "word", "char" or "byte".
        vocab_size: ids are 0 .. vocab_size - 1.
        separator: id put between documents, or None.
        specials: ids that no text encodes to, by name.
    """

    kind: str
    vocab_size: int
    separator: int | None = None
    specials: dict[str, int]

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
        rows = self.encode_batch(documents)
        tail = [] if self.separator is None else [self.separator]
        parts = [np.asarray(list(row) + tail, dtype=np.uint32) for row in rows]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def require(self, *names: str) -> list[int]:
        """The ids of these specials.

        Raises:
            ValueError: the tokenizer lacks one.
        """
        missing = [name for name in names if name not in self.specials]
        if missing:
            raise ValueError(
                f"the {self.kind} tokenizer has no {', '.join(missing)}, which this task needs; it has "
                f"{', '.join(self.specials) or 'no special tokens'}. Take a new one"
            )
        return [self.specials[name] for name in names]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and after them the specials."""

    kind = "byte"

    def __init__(self, specials: Sequence[str] = ()) -> None:
        self.specials = _after(256, specials)
        self.vocab_size = 256 + len(specials)
        self._names = list(specials)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        parts = (bytes([i]) if i < 256 else self._names[i - 256].encode() for i in map(int, ids))
        return b"".join(parts).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "fastlm-byte", **_listed(self.specials)})


class CharTokenizer(Tokenizer):
    """One id per character seen in the corpus, in order of code point, and after them the specials.

    Args:
        characters: the alphabet, each character once.
    """

    kind = "char"

    def __init__(self, characters: str, specials: Sequence[str] = ()) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError(f"characters must be one or more different characters, got {characters[:40]!r}")
        self.characters = characters
        self.specials = _after(len(characters), specials)
        self.vocab_size = len(characters) + len(specials)
        self._names = [*characters, *specials]
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, documents: Iterable[str], specials: Sequence[str] = ()) -> CharTokenizer:
        """The alphabet of the documents."""
        found: set[str] = set()
        for text in documents:
            found.update(text)
        return cls("".join(sorted(found)), specials)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is not among the {len(self.characters)} characters this tokenizer knows: "
                f"{self.characters[:100]!r}; the byte and bpe tokenizers take any text"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._names[int(i)] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"type": "fastlm-char", "characters": self.characters, **_listed(self.specials)})


class WordTokenizer(Tokenizer):
    """One id per word or punctuation mark, the commonest first; 0 stands for all others. After them the specials.

    Args:
        words: each once; the first is the name of what is unknown.
    """

    kind = "word"
    _PATTERN = re.compile(r"\w+(?:[-'’]\w+)*|['’](?:s|t|m|d|re|ve|ll)\b|[^\w\s]")

    def __init__(self, words: Sequence[str], specials: Sequence[str] = ()) -> None:
        if not words or len(set(words)) != len(words):
            raise ValueError(f"words must be one or more different words, got {list(words[:10])}")
        self.words = list(words)
        self.specials = _after(len(words), specials)
        self.vocab_size = len(words) + len(specials)
        # A word brings the space before it, so that texts can be put together piece by piece.
        self._pieces = [w if w[0] in ".,;:!?)]}%…'’" else f" {w}" for w in (*words, *specials)]
        self._ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = 4096, specials: Sequence[str] = ()) -> WordTokenizer:
        """The commonest words of the documents.

        Args:
            vocab_size: ids in all at most. Words that occur once are left out in any case: what stands for the unknown
                is learnt from them.
        """
        counts = Counter(word for text in documents for word in cls._PATTERN.findall(text))
        known = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
        if vocab_size < 2 + len(specials):
            raise ValueError(f"vocab_size must be at least {2 + len(specials)} for words, got {vocab_size}")
        return cls([UNKNOWN, *known[: vocab_size - 1 - len(specials)]], specials)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, 0) for word in self._PATTERN.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[int(i)] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"type": "fastlm-word", "words": self.words, **_listed(self.specials)})


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2).

    The file is Hugging Face's tokenizer.json, which transformers and others read as it is. Text that happens to
    contain the name of a special stays text. A folder's tokenizer.json of another kind (BERT's WordPiece) is run as it
    is, though what it decodes to may then differ from the text.
    """

    kind = "bpe"

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner.encode_special_tokens = True  # else "<|endoftext|>" in a text would not come back as it went in
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.separator = inner.token_to_id(END_OF_TEXT)
        added = sorted(inner.get_added_tokens_decoder().items())
        self.specials = {token.content: i for i, token in added if token.special}

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = 4096, specials: Sequence[str] = ()) -> BPETokenizer:
        """Learn merges from the documents until there are vocab_size ids.

        Args:
            vocab_size: at least 257, the bytes and the separator, and the specials.
            specials: names of further ids, after the separator's.
        """
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257 + len(specials):
            raise ValueError(f"vocab_size must be at least {257 + len(specials)} for byte-level BPE, got {vocab_size}")
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, *specials],
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

    def encode_batch(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        for start in range(0, len(texts), 256):
            for found in self._inner.encode_batch(list(texts[start : start + 256]), add_special_tokens=False):
                yield found.ids


def _after(count: int, specials: Sequence[str]) -> dict[str, int]:
    if len(set(specials)) != len(specials):
        raise ValueError(f"specials must be different names, got {list(specials)}")
    return {name: count + i for i, name in enumerate(specials)}


def _listed(specials: dict[str, int]) -> dict[str, list[str]]:
    """Nothing where there are none: files of before keep their fingerprint."""
    return {"specials": list(specials)} if specials else {}


def make_tokenizer(
    tokenizer: str | Tokenizer,
    train: Sequence[str],
    validation: Sequence[str],
    vocab_size: int = 4096,
    specials: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a data folder: one that is there already, or one learnt from its training texts.

    Args:
        tokenizer: "bpe", "word", "char", "byte", or a Tokenizer.
        vocab_size: most ids of bpe and word; the others have their own.
        specials: names of ids that it must have.

    Raises:
        ValueError: an unknown kind; a tokenizer without one of the specials.
    """
    if isinstance(tokenizer, Tokenizer):
        tokenizer.require(*specials)
        return tokenizer
    if tokenizer == "bpe":
        return BPETokenizer.train(train, vocab_size, specials)
    if tokenizer == "word":
        return WordTokenizer.train(train, vocab_size, specials)
    if tokenizer == "char":  # nanoGPT's way too: the alphabet of the whole corpus, or validation might not encode
        return CharTokenizer.train((*train, *validation), specials)
    if tokenizer == "byte":
        return ByteTokenizer(specials)
    raise ValueError(f"tokenizer must be one of {', '.join(KINDS)}, got {tokenizer!r}")


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
        return ByteTokenizer(content.get("specials", ()))
    if kind == "fastlm-char":
        return CharTokenizer(content["characters"], content.get("specials", ()))
    if kind == "fastlm-word":
        return WordTokenizer(content["words"], content.get("specials", ()))
    from tokenizers import Tokenizer as Inner

    try:
        return BPETokenizer(Inner.from_str(text))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from None
