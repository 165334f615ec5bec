"""Text to train on, split into training and validation documents.

A document is one file. Which side it falls on is decided by the hash of its contents, so the split is the same
everywhere, does not change when other files come or go, and two copies of one file never stand on both sides.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")

VALIDATION_SHARE = 0.1
SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".json", ".csv", ".html", ".tex")

# Tests repeat themselves and quote the code they test; the rest are tables written by generators, not text.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"}
)


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents, and where they come from.

    Attributes:
        train, validation: the documents, in a fixed order.
        source: what the text is, in a few words.
        licence: the licence it is under, as far as is known.
        sha256: hash of all documents, in order, and of the split.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    source: str
    licence: str
    sha256: str

    @property
    def bytes(self) -> tuple[int, int]:
        """UTF-8 bytes of the training and the validation documents."""
        return _size(self.train), _size(self.validation)


def _size(documents: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def fingerprint(train: Sequence[str], validation: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for side in (train, validation):
        for text in side:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"\xff")
    return digest.hexdigest()


def share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the document."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def hold_out(rows: Sequence[Row], text: Callable[[Row], str], source: str) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to validate: these about a tenth, at least one, picked by the hash of each row's text,
    so that equal texts stand on one side.

    Raises:
        ValueError: nothing would be left to train on; names the source.
    """
    shares = [share(text(row)) for row in rows]
    least = min(shares, default=0.0)
    chosen = [s < VALIDATION_SHARE or s == least for s in shares]
    if all(chosen):
        raise ValueError(f"{source} has {len(rows)} examples, too few to keep some to validate on")
    train = [row for row, out in zip(rows, chosen, strict=True) if not out]
    return train, [row for row, out in zip(rows, chosen, strict=True) if out]


def _split(documents: Iterable[str], source: str, licence: str) -> Corpus:
    """By the hash of each document; of equal documents only the first is kept."""
    unique = list(dict.fromkeys(documents))
    validation = [text for text in unique if share(text) < VALIDATION_SHARE]
    if not validation:  # few files: the one with the smallest hash
        validation = [min(unique, key=share)]
    held_out = set(validation)
    train = [text for text in unique if text not in held_out]
    return Corpus(tuple(train), tuple(validation), source, licence, fingerprint(train, validation))


def standard_library(megabytes: float | None = None) -> Corpus:
    """The sources of the running interpreter's standard library: real text on every machine, with no download.

    Tests and generated tables are left out. The contents differ between Python versions, so `source` names the
    version and `sha256` tells one corpus from another.

    Args:
        megabytes: keep files, picked by their hash, until there are this many (10^6 bytes); None keeps all.

    Raises:
        FileNotFoundError: this Python comes without the sources of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or path.name.startswith("_sysconfigdata"):
            continue
        text = _read_python(path)
        if text.strip():
            documents.append(text)
    if sum(len(text) for text in documents) < 100_000:
        raise FileNotFoundError(
            f"the standard library of this Python has no sources to train on: found {len(documents)} usable .py files "
            f"in {root}; give text files instead, as in: fastlm train FILE_OR_FOLDER"
        )
    if megabytes is not None:
        documents = _some(documents, megabytes * 1e6)
    return _split(documents, f"standard library of Python {platform.python_version()}", "PSF-2.0")


def _some(documents: list[str], limit: float) -> list[str]:
    """Documents in their order, picked by a hash that the split does not use, up to this many bytes."""
    ranked = sorted(documents, key=lambda text: hashlib.sha256(b"pick" + text.encode()).digest())
    kept, total = set(), 0
    for text in ranked:
        if total and total + len(text.encode()) > limit:
            break
        kept.add(text)
        total += len(text.encode())
    return [text for text in documents if text in kept]


def _read_python(path: Path) -> str:
    """A source file in the encoding it declares; '' for the few that do not decode, kept to test the compiler."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def from_paths(
    paths: Sequence[str | Path], licence: str = "not stated", validation: Sequence[str | Path] = ()
) -> Corpus:
    """Text files and folders of text files, in UTF-8.

    A folder gives every text file below it. Without `validation`, with one file in all, its last tenth is the
    validation text; with more, about a tenth of the files.

    Args:
        validation: files and folders to validate on.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no text file.
        ValueError: a file is not UTF-8, or there is too little text to split.
    """
    documents = _read(paths)
    source = ", ".join(str(path) for path in paths)
    if validation:
        train, held_out = tuple(dict.fromkeys(documents)), tuple(dict.fromkeys(_read(validation)))
        return Corpus(train, held_out, source, licence, fingerprint(train, held_out))
    if len(set(documents)) > 1:
        return _split(documents, source, licence)
    text = documents[0]
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    head, tail = text[:cut], text[cut:]
    if not head or not tail:
        raise ValueError(f"data: {source} has {len(text)} characters, too few to keep a tenth for validation")
    return Corpus((head,), (tail,), source, licence, fingerprint([head], [tail]))


def _read(paths: Sequence[str | Path]) -> list[str]:
    """The texts of files and folders."""
    if not paths:
        raise ValueError("data must be one or more text files or folders, got none")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise FileNotFoundError(f"{path} has no text file; files that end in {', '.join(SUFFIXES)} are read")
            files += found
        else:
            raise FileNotFoundError(f"data: {path} does not exist; give text files or folders of text files")
    documents = []
    for file in dict.fromkeys(files):
        try:
            documents.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    documents = [text for text in documents if text]
    if not documents:
        raise ValueError(f"data: {', '.join(map(str, paths))} holds no text; a corpus needs at least two characters")
    return documents
