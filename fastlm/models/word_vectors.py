"""Word vectors trained elsewhere, as the start of an embedding: GloVe's and word2vec's files."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import nn


def load_word_vectors(
    embedding: nn.Embedding,
    path: str | os.PathLike[str],
    words: Mapping[str, int] | Sequence[str],
    freeze: bool = False,
) -> int:
    """Copies the vectors of a file into the rows of an embedding; words the file has not keep theirs.

    Reads GloVe's text (Pennington et al. 2014) and word2vec's text and binary formats (Mikolov et al. 2013,
    arXiv:1301.3781), also gzipped, a word at a time: only the embedding's rows are held. Where a word comes twice, the
    first counts.

    Args:
        embedding: (V, C); the file's vectors must be C wide.
        path: the file.
        words: the row of each word, or the words in the order of the rows.
        freeze: the embedding takes no part in training from now on (and a head tied to it neither).

    Returns:
        How many words were found.

    Raises:
        FileNotFoundError: no such file.
        ValueError: vectors of another width, a line or an entry that cannot be read (by its number), or none of the
            words is there. The embedding is then as it was.
    """
    rows = dict(words) if isinstance(words, Mapping) else {word: i for i, word in enumerate(words)}
    V, C = embedding.weight.shape
    outside = [word for word, row in rows.items() if not 0 <= row < V]
    if outside:
        raise ValueError(f"words must have rows in 0 .. {V - 1}, got {rows[outside[0]]} for {outside[0]!r}")
    found: dict[int, np.ndarray] = {}
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"word vectors: {path} does not exist")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else open(path, "rb") as file:
        for word, vector in _vectors(cast(IO[bytes], file), C, path):
            row = rows.get(word)
            if row is not None:
                found.setdefault(row, vector)
    if not found:
        raise ValueError(f"none of the {len(rows)} words is in {path}")
    with torch.no_grad():
        values = torch.from_numpy(np.stack(list(found.values())))
        embedding.weight[torch.tensor(list(found), device=embedding.weight.device)] = values.to(embedding.weight)
    if freeze:
        embedding.weight.requires_grad_(False)
    return len(found)


def _vectors(file: IO[bytes], width: int, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every word and its vector, (width,) float32."""
    first = file.readline()
    fields = first.split()
    if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():  # word2vec's head: how many, how wide
        count, wide = int(fields[0]), int(fields[1])
        if wide != width:
            raise ValueError(f"{path} has vectors of width {wide}, the embedding of {width}")
        line = file.readline()
        if _is_text(line, width):
            yield from _lines(line, file, width, path, 2)
        else:
            yield from _entries(line, file, width, path, count)
    else:
        yield from _lines(first, file, width, path, 1)


def _is_text(line: bytes, width: int) -> bool:
    try:
        [float(field) for field in line.decode().split()[-width:]]
    except ValueError:
        return False
    return len(line.split()) > width


def _lines(line: bytes, file: IO[bytes], width: int, path: Path, number: int) -> Iterator[tuple[str, np.ndarray]]:
    """A word, a space, the numbers; from `line` on, which has that number. Some of GloVe's words have spaces."""
    while line:
        fields = line.rstrip().rsplit(b" ", width)
        try:
            if len(fields) != width + 1:
                raise ValueError(f"{len(line.split()) - 1} numbers")
            vector = np.array([float(field) for field in fields[1:]], dtype=np.float32)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: a word and {width} numbers, the embedding's width, are needed: {error}"
            ) from None
        yield fields[0].decode(errors="replace"), vector
        line = file.readline()
        number += 1


def _entries(start: bytes, file: IO[bytes], width: int, path: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """A word, a space, the numbers as little-endian float32, sometimes a line end; `start` was read already."""
    size, buffer, at = 4 * width, start, 0
    for number in range(count):
        while (space := buffer.find(b" ", at)) < 0 or len(buffer) < space + 1 + size:
            more = file.read(1 << 20)
            if not more:
                raise ValueError(f"{path} is truncated: it says {count} words and ends within word {number + 1}")
            buffer, at = buffer[at:] + more, 0
        vector = np.frombuffer(buffer, dtype="<f4", count=width, offset=space + 1).astype(np.float32)
        yield buffer[at:space].lstrip(b"\n").decode(errors="replace"), vector
        at = space + 1 + size
