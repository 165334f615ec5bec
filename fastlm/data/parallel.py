"""Parallel text: each line and its translation, from files to a folder of shards to padded batches."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastlm.data.batches import IGNORE
from fastlm.data.corpus import fingerprint, hold_out
from fastlm.data.dataset import read_info, write_info
from fastlm.data.rows import BucketedRows, Rows, SortedRows, open_rows, pad_rows, real_positions, write_rows
from fastlm.data.tables import read_lines
from fastlm.data.tokenizer import PAD, Tokenizer, load_tokenizer, make_tokenizer

BOS, EOS = "[BOS]", "[EOS]"
PAIR_SPECIALS = (PAD, BOS, EOS)
"""Padding, what a decoder starts from, what a source and a target end with."""
SOURCE = "source"
"""Folder, within the data's, of a tokenizer that only the sources have."""


def read_pairs(paths: Sequence[str | Path]) -> list[tuple[str, str]]:
    """Sources and targets: of two files the lines of one number, of one file what a tab sets apart.

    Lines that are empty on both sides are left out.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: another number of files; files of unequal length; a line that is empty on one side, is no pair or
            not UTF-8. The message names file and line.
    """
    if len(paths) == 1:
        pairs = []
        for line, where in read_lines(Path(paths[0])):
            fields = line.split("\t") if line.strip() else ["", ""]
            if len(fields) != 2:
                raise ValueError(f"{where} must be a source and its target, apart by one tab, got {len(fields)} fields")
            pairs.append((fields[0], fields[1], where, where))
    elif len(paths) == 2:
        sides = [list(read_lines(Path(path))) for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f"{paths[0]} has {len(sides[0])} lines and {paths[1]} {len(sides[1])}; line n of one must be the "
                "translation of line n of the other"
            )
        pairs = [(source[0], target[0], source[1], target[1]) for source, target in zip(*sides, strict=True)]
    else:
        raise ValueError(f"data must be two parallel files or one of lines source<TAB>target, got {len(paths)} files")
    found = []
    for source, target, source_at, target_at in pairs:
        source, target = source.strip(), target.strip()
        if bool(source) != bool(target):
            empty, side = (source_at, "source") if target else (target_at, "target")
            raise ValueError(f"{empty} has an empty {side}; a pair has two sides, or both are empty")
        if source:
            found.append((source, target))
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))} has no pairs")
    return found


class Pairs(NamedTuple):
    """Encoded pairs: ids of each source and each target, uncut, without specials."""

    source: Rows
    target: Rows


@dataclass(frozen=True)
class ParallelText:
    """A folder of pairs: tokenizer.json, {train,validation}.{source,target} (.tokens, .lengths), dataset.json.

    Batches are for Seq2SeqLM: source (B, T) int64, ids and [EOS], padded to the longest; source_mask (B, T) bool;
    tokens (B, S) int64, [BOS] and ids; targets (B, S) int64, ids and [EOS], IGNORE for padding.

    Attributes:
        tokenizer, source_tokenizer: of the targets and of the sources; one object where they share it.
        info: source, sha256, python, tokenizer kind, vocabularies, pairs and tokens of each side.
    """

    folder: Path
    tokenizer: Tokenizer
    source_tokenizer: Tokenizer
    train: Pairs
    validation: Pairs
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> ParallelText:
        """Open what was prepared.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another task, or files do not belong together.
        """
        folder = Path(folder)
        info = read_info(folder)
        if info.get("task") != "seq2seq":
            raise ValueError(f"{folder} was prepared for the task {info.get('task', 'lm')}, not seq2seq")
        tokenizer = load_tokenizer(folder)
        source_tokenizer = tokenizer if info["joint"] else load_tokenizer(folder / SOURCE)
        sides = []
        for name in ("train", "validation"):
            rows = [
                open_rows(folder, f"{name}.{side}", made.vocab_size, made.fingerprint)
                for side, made in (("source", source_tokenizer), ("target", tokenizer))
            ]
            if len(rows[0]) != len(rows[1]):
                raise ValueError(f"{folder}: {name}.source has {len(rows[0])} rows, {name}.target {len(rows[1])}")
            sides.append(Pairs(*rows))
        return cls(folder, tokenizer, source_tokenizer, sides[0], sides[1], info)

    @classmethod
    def prepare(
        cls,
        paths: Sequence[str | Path],
        folder: str | Path,
        tokenizer: str | Tokenizer = "bpe",
        vocab_size: int = 4096,
        validation: Sequence[str | Path] = (),
        source_tokenizer: str | Tokenizer | None = None,
    ) -> ParallelText:
        """Read parallel files, train the tokenizers on the training pairs, write both sides to a folder, open it.

        Args:
            paths: as read_pairs.
            tokenizer, vocab_size: as make_tokenizer, with PAIR_SPECIALS.
            validation: as paths; none keeps the tenth of the training pairs that the hash of the source picks, so that
                equal sources stand on one side.
            source_tokenizer: None: one tokenizer for both, which learns from both. Else the sources have their own.

        Raises: as read_pairs, and ValueError where there are too few pairs to split.
        """
        folder = Path(folder)
        train = read_pairs(paths)
        if validation:
            held_out = read_pairs(validation)
        else:
            train, held_out = hold_out(train, lambda pair: pair[0], ", ".join(map(str, paths)))
        joint = source_tokenizer is None
        sides = (0, 1) if joint else (1,)
        made = make_tokenizer(tokenizer, _texts(train, *sides), _texts(held_out, *sides), vocab_size, PAIR_SPECIALS)
        source_made = made
        if source_tokenizer is not None:
            source_made = make_tokenizer(
                source_tokenizer, _texts(train, 0), _texts(held_out, 0), vocab_size, PAIR_SPECIALS
            )
            source_made.save(folder / SOURCE)
        made.save(folder)
        info = {
            "task": "seq2seq", "source": ", ".join(map(str, paths)),
            "sha256": fingerprint(_lines(train), _lines(held_out)),
            "python": platform.python_version(), "tokenizer": made.kind, "vocab_size": made.vocab_size,
            "source_vocab_size": source_made.vocab_size, "joint": joint,
        }  # fmt: skip
        for name, part in (("train", train), ("validation", held_out)):
            for i, side, by in ((0, "source", source_made), (1, "target", made)):
                rows = list(by.encode_batch(_texts(part, i)))
                write_rows(folder, f"{name}.{side}", rows, by.vocab_size, by.fingerprint)
                info[f"{name}_{side}_tokens"] = sum(map(len, rows))
            info[f"{name}_pairs"] = len(part)
        write_info(folder, info)
        return cls.open(folder)

    def train_batches(self, batch: int, seed: int, context: int) -> ParallelBatches:
        """Each pair once an epoch, those of like length together, as BucketedRows; without those that are too long.

        Raises:
            ValueError: no pair is short enough.
        """
        kept = np.flatnonzero(self._fits(context))
        if not len(kept):
            raise ValueError(f"none of the {len(self.train.target)} training pairs fits into a context of {context}")
        lengths = self.train.source.lengths[kept] + self.train.target.lengths[kept]
        return ParallelBatches(self, self.train, BucketedRows(lengths, batch, seed), context, kept)

    def overlong(self, context: int) -> int:
        """How many training pairs have a side that, with [EOS], is longer than the context; they take no part."""
        return int((~self._fits(context)).sum())

    def _fits(self, context: int) -> np.ndarray:
        return np.maximum(self.train.source.lengths, self.train.target.lengths) < context

    def validation_batches(self, batch: int, context: int) -> ParallelBatches:
        """Each pair once, from the shortest to the longest, cut where it is longer than the context; the last batch may
        have fewer rows."""
        return self._once(self.validation, batch, context)

    def evaluation_batches(self, paths: Sequence[str | Path], batch: int, context: int) -> ParallelBatches:
        """As validation_batches, of other files. Raises as read_pairs."""
        pairs = read_pairs(paths)
        sides = []
        for i, by in enumerate((self.source_tokenizer, self.tokenizer)):
            rows = list(by.encode_batch(_texts(pairs, i)))
            flat = np.array([token for row in rows for token in row], dtype=np.int64)
            sides.append(Rows(flat, np.array([len(row) for row in rows])))
        return self._once(Pairs(*sides), batch, context)

    def _once(self, pairs: Pairs, batch: int, context: int) -> ParallelBatches:
        order = SortedRows(pairs.source.lengths + pairs.target.lengths, batch)
        return ParallelBatches(self, pairs, order, context, np.arange(len(pairs.target)))


class ParallelBatches:
    """Batches of pairs, as ParallelText says.

    Args:
        order: numbers of each batch, among kept.
        context: ids a row at most, [EOS] or [BOS] included; at least 2.
        kept: rows of the pairs.
    """

    def __init__(
        self, data: ParallelText, pairs: Pairs, order: BucketedRows | SortedRows, context: int, kept: np.ndarray
    ) -> None:
        if context < 2:
            raise ValueError(f"context must be at least 2, got {context}")
        self.pairs, self.order, self.context, self.kept = pairs, order, context, kept
        self._source_tokenizer = data.source_tokenizer
        self._pad, self._bos, self._eos = data.tokenizer.require(*PAIR_SPECIALS)

    def __len__(self) -> int:
        """Of validation_batches; training goes on for ever."""
        if isinstance(self.order, BucketedRows):
            raise TypeError("training batches have no last one")
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rows = self.kept[self.order[number]]
        whole = [[self._bos, *self.pairs.target[i].tolist(), self._eos] for i in rows]
        return {
            **pad_sources(self._source_tokenizer, [self.pairs.source[i].tolist() for i in rows], self.context),
            "tokens": pad_rows([row[:-1][: self.context] for row in whole], self._pad),
            "targets": pad_rows([row[1:][: self.context] for row in whole], IGNORE),
        }


def _lines(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return ["\t".join(pair) for pair in pairs]


def _texts(pairs: Sequence[tuple[str, str]], *sides: int) -> list[str]:
    return [pair[side] for side in sides for pair in pairs]


def pad_sources(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], context: int) -> dict[str, Tensor]:
    """source (B, T) int64 and source_mask (B, T) bool of encoded sources: cut, closed by [EOS], padded."""
    pad, eos = tokenizer.require(PAD, EOS)
    closed = [[*row[: context - 1], eos] for row in rows]
    return {"source": pad_rows(closed, pad), "source_mask": real_positions(closed)}


def target_texts(tokenizer: Tokenizer, tokens: Tensor) -> list[str]:
    """The texts of targets (B, L), generated or of a batch: each up to its first [EOS], without specials and IGNORE."""
    pad, bos, eos = tokenizer.require(*PAIR_SPECIALS)
    texts = []
    for row in tokens.tolist():
        ids = row[: row.index(eos)] if eos in row else row
        texts.append(tokenizer.decode([i for i in ids if i not in (pad, bos, IGNORE)]))
    return texts
