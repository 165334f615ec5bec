"""Texts with a class each, and sentences with a tag for each word: files, a folder of shards, padded batches."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastlm.data.batches import IGNORE
from fastlm.data.corpus import fingerprint, hold_out
from fastlm.data.dataset import read_info, write_info
from fastlm.data.rows import BucketedRows, Rows, SortedRows, open_rows, pad_rows, real_positions, write_rows
from fastlm.data.shards import open_shard, write_shard
from fastlm.data.tables import Example, read_classified, read_tagged
from fastlm.data.tokenizer import CLS, ENCODER_SPECIALS, MASK, PAD, SEP, Tokenizer, load_tokenizer, make_tokenizer

Opened = TypeVar("Opened", bound="LabelledText")


@dataclass(frozen=True)
class Side:
    """Encoded examples.

    Attributes:
        rows: ids of each example, uncut and without [CLS] and [SEP].
        labels: numbers of labels: one an example, or one an id, where the number of labels stands for none.
    """

    rows: Rows
    labels: np.ndarray

    def counts(self, labels: int) -> np.ndarray:
        """(labels,), how often each occurs."""
        return np.bincount(self.labels, minlength=labels)[:labels]


@dataclass(frozen=True)
class LabelledText:
    """A folder of labelled examples: tokenizer.json, train and validation (.tokens, .lengths, .labels), dataset.json.

    Batches are for MaskedLM: rows [CLS] ids [SEP], cut at the context and padded to the longest of the batch.

    Attributes:
        labels: names; targets are their numbers.
        info: source, sha256, python, tokenizer kind, examples and tokens of each side.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Side
    validation: Side
    labels: tuple[str, ...]
    info: dict[str, Any]

    task: ClassVar[str]
    per_id: ClassVar[bool]

    @classmethod
    def open(cls: type[Opened], folder: str | Path) -> Opened:
        """Open what was prepared.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another task, or files do not belong together.
        """
        folder = Path(folder)
        info = read_info(folder)
        if info.get("task") != cls.task:
            raise ValueError(f"{folder} was prepared for the task {info.get('task', 'lm')}, not {cls.task}")
        tokenizer, labels = load_tokenizer(folder), tuple(info["labels"])
        sides = []
        for name in ("train", "validation"):
            rows = open_rows(folder, name, tokenizer.vocab_size, tokenizer.fingerprint)
            shard = open_shard(folder / f"{name}.labels", len(labels) + 1, tokenizer.fingerprint)
            expected = len(rows.ids) if cls.per_id else len(rows)
            if len(shard) != expected:
                raise ValueError(f"{shard.path} has {len(shard)} labels, {name}.tokens beside it has {expected} places")
            sides.append(Side(rows, shard.tokens))
        return cls(folder, tokenizer, sides[0], sides[1], labels, info)

    def train_batches(self, batch: int, seed: int, context: int) -> LabelledBatches:
        """Each example once an epoch, those of like length together; as BucketedRows."""
        lengths = np.minimum(self.train.rows.lengths, context - 2)
        return LabelledBatches(self, self.train, BucketedRows(lengths, batch, seed), context)

    def validation_batches(self, batch: int, context: int) -> LabelledBatches:
        """Each example once, from the shortest to the longest; the last batch may have fewer rows."""
        return LabelledBatches(self, self.validation, SortedRows(self.validation.rows.lengths, batch), context)

    def evaluation_batches(self, path: str | Path, batch: int, context: int) -> LabelledBatches:
        """As validation_batches, of another labelled file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line of it is malformed or has a label the training data has not.
        """
        side = self._encode(self._read(Path(path), self.labels), self.tokenizer, self.labels)
        return LabelledBatches(self, side, SortedRows(side.rows.lengths, batch), context)

    def class_weights(self) -> tuple[float, ...]:
        """Weights of the classes' losses that give each the same share: inverse to their counts in the training data,
        1 on average over it."""
        counts = self.train.counts(len(self.labels))
        return tuple(float(w) for w in counts.sum() / (len(self.labels) * np.maximum(counts, 1)))

    @classmethod
    def prepare(
        cls: type[Opened],
        paths: Sequence[str | Path],
        folder: str | Path,
        tokenizer: str | Tokenizer = "bpe",
        vocab_size: int = 4096,
        validation: str | Path | None = None,
    ) -> Opened:
        """Read labelled files, train a tokenizer on the training texts, write both sides to a folder, open it.

        Args:
            paths: training files.
            tokenizer, vocab_size: as make_tokenizer.
            validation: file to validate on; None keeps the tenth of the training examples that the hash of the text
                picks, so that equal texts stand on one side.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a line is malformed; a label of the validation file does not occur in training; there are fewer
                than two labels, or too few examples to split. The message names file and line.
        """
        if not paths:
            raise ValueError("data must be one or more labelled files, got none")
        folder = Path(folder)
        examples = [example for path in paths for example in cls._read(Path(path), None)]
        labels = tuple(sorted({label for example in examples for label in example.labels}))
        if len(labels) < 2:
            raise ValueError(f"{', '.join(map(str, paths))} must have at least two labels, got {', '.join(labels)}")
        if validation is None:
            train, held_out = hold_out(examples, lambda example: example.text, ", ".join(map(str, paths)))
        else:
            train, held_out = examples, cls._read(Path(validation), labels)
            if not held_out:
                raise ValueError(f"{validation} has no examples")
        texts, others = [example.text for example in train], [example.text for example in held_out]
        made = make_tokenizer(tokenizer, texts, others, vocab_size, ENCODER_SPECIALS)
        lines = [["\t".join((*e.words, *e.labels)) for e in side] for side in (train, held_out)]
        info = {
            "task": cls.task, "source": ", ".join(map(str, paths)), "sha256": fingerprint(*lines),
            "python": platform.python_version(), "tokenizer": made.kind, "vocab_size": made.vocab_size,
            "labels": list(labels),
        }  # fmt: skip
        made.save(folder)
        for name, part in (("train", train), ("validation", held_out)):
            side = cls._encode(part, made, labels)
            rows = [side.rows[i].tolist() for i in range(len(side.rows))]
            write_rows(folder, name, rows, made.vocab_size, made.fingerprint)
            write_shard(folder / f"{name}.labels", side.labels, len(labels) + 1, made.fingerprint)
            info[f"{name}_examples"], info[f"{name}_tokens"] = len(rows), len(side.rows.ids)
        write_info(folder, info)
        return cls.open(folder)

    @staticmethod
    def _read(path: Path, labels: Sequence[str] | None = None) -> list[Example]:
        """The examples of a file; labels: what is known as one, None takes any."""
        raise NotImplementedError

    @classmethod
    def _encode(cls, examples: Sequence[Example], tokenizer: Tokenizer, labels: Sequence[str]) -> Side:
        number, none = {label: i for i, label in enumerate(labels)}, len(labels)
        # A word after another is read with the space before it, as it stands in running text.
        spaced = [[word if i == 0 else f" {word}" for i, word in enumerate(e.words)] for e in examples]
        unique = list(dict.fromkeys(word for words in spaced for word in words))
        (unknown,) = tokenizer.require(MASK)  # of a word that a tokenizer's normaliser leaves nothing of
        ids = {
            word: list(found) or [unknown] for word, found in zip(unique, tokenizer.encode_batch(unique), strict=True)
        }
        flat: list[int] = []
        lengths: list[int] = []
        found: list[int] = []
        for example, words in zip(examples, spaced, strict=True):
            before = len(flat)
            for word, label in zip(words, example.labels, strict=True):
                flat += ids[word]
                found += [number[label]] + [none] * (len(ids[word]) - 1 if cls.per_id else 0)
            lengths.append(len(flat) - before)
        rows = Rows(np.array(flat, dtype=np.int64), np.array(lengths, dtype=np.int64))
        return Side(rows, np.array(found, dtype=np.int64))


class ClassifiedText(LabelledText):
    """Texts with a class each, from tables as read_classified reads them."""

    task, per_id = "classify", False
    _read = staticmethod(read_classified)


class TaggedText(LabelledText):
    """Sentences with a tag for each word, from columns as read_tagged reads them.

    A word of several ids has its tag at the first; the others have none.
    """

    task, per_id = "tag", True
    _read = staticmethod(read_tagged)


class LabelledBatches:
    """Batches of one side: tokens (B, S) int64, mask (B, S) bool, targets (B,) or, of tags, (B, S) int64.

    Args:
        data, side: where the rows come from.
        order: row numbers of each batch.
        context: ids a row at most, [CLS] and [SEP] included; at least 3.
    """

    def __init__(self, data: LabelledText, side: Side, order: BucketedRows | SortedRows, context: int) -> None:
        if context < 3:
            raise ValueError(f"context must be at least 3, got {context}")
        self.side, self.order, self.context = side, order, context
        self._pad, self._cls, self._sep = data.tokenizer.require(PAD, CLS, SEP)
        self._tags, self._none = None, len(data.labels)
        if data.per_id:
            self._tags = Rows(side.labels, side.rows.lengths)

    def __len__(self) -> int:
        """Of validation_batches; training goes on for ever."""
        if isinstance(self.order, BucketedRows):
            raise TypeError("training batches have no last one")
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        chosen, most = self.order[number], self.context - 2
        rows = [[self._cls, *self.side.rows[i][:most].tolist(), self._sep] for i in chosen]
        if self._tags is None:
            targets = torch.from_numpy(self.side.labels[chosen].astype(np.int64))
        else:
            tags = (self._tags[i][:most].astype(np.int64) for i in chosen)
            targets = pad_rows([[IGNORE, *np.where(t == self._none, IGNORE, t).tolist(), IGNORE] for t in tags], IGNORE)
        return {"tokens": pad_rows(rows, self._pad), "mask": real_positions(rows), "targets": targets}
