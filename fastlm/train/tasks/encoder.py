"""What the tasks of an encoder share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from fastlm.data import IGNORE, Tokenizer
from fastlm.data.labelled import LabelledText
from fastlm.data.rows import pad_rows, real_positions
from fastlm.data.tokenizer import CLS, PAD, SEP
from fastlm.metrics import accuracy, confusion, majority_accuracy
from fastlm.models import MaskedLM, MaskedLMConfig
from fastlm.train.config import ModelOptions
from fastlm.train.tasks.task import Batch, Data, Measure, Model, Task, count_targets, refuse


class EncoderTask(Task):
    """The name of the task is that of MaskedLM's head."""

    model = MaskedLM

    def config(self, options: ModelOptions, data: Data | None) -> MaskedLMConfig:
        refuse(options, self.name, "decoder_layers", "kv_heads")
        labels = () if data is None else labels_of(data)
        return MaskedLMConfig(
            vocab_size=1 << 16 if data is None else data.tokenizer.vocab_size, context=options.context,
            layers=options.layers, heads=options.heads, width=options.width, dropout=options.dropout, head=self.name,
            classes=None if self.name == "mlm" else len(labels) or 2,
        )  # fmt: skip

    def adapt(self, model: Model, labels: Sequence[str], data: Data) -> MaskedLM:
        assert isinstance(model, MaskedLM)
        wanted = labels_of(data)
        if model.config.head == self.name and tuple(labels) == wanted:
            return model
        return model.with_head(self.name, len(wanted) or None)


def labels_of(data: Data) -> tuple[str, ...]:
    """What classify and tag tell apart."""
    return tuple(getattr(data, "labels", ()))


class LabelMeasure(Measure):
    """Guessed and right labels beside the loss, row by row."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = labels
        self.guessed: list[list[int]] = []
        self.right: list[list[int]] = []

    def add(self, model: Model, batch: Batch) -> None:
        targets = batch["targets"]
        out = model(**batch, reduction="sum")
        assert out.loss is not None and out.logits is not None
        self.targets = self.targets + count_targets(batch)
        self.total = self.total + out.loss.double()
        shape = (len(targets), -1)
        for guessed, right in zip(out.logits.argmax(-1).view(shape), targets.view(shape), strict=True):
            self.guessed.append(guessed[right != IGNORE].tolist())
            self.right.append(right[right != IGNORE].tolist())

    def counts(self) -> np.ndarray:
        """(K, K), how often the label of the row was taken for that of the column."""
        right, guessed = (list(chain.from_iterable(rows)) for rows in (self.right, self.guessed))
        return confusion(right, guessed, len(self.labels))

    def figures(self) -> dict[str, float]:
        return {**super().figures(), "accuracy": accuracy(self.counts())}


def majority(data: LabelledText) -> float:
    """Accuracy of always guessing the commonest label of the training data."""
    train, held_out = (side.counts(len(data.labels)) for side in (data.train, data.validation))
    return majority_accuracy(train, np.diag(held_out))


def one_file(paths: Sequence[Path]) -> Path | None:
    """The validation file.

    Raises:
        ValueError: there are several.
    """
    if len(paths) > 1:
        raise ValueError(f"validation must be one file, got {', '.join(map(str, paths))}")
    return paths[0] if paths else None


def framed(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], context: int) -> Batch:
    """Texts as the model was trained on them: [CLS] ids [SEP], cut to the context, filled up to one length."""
    pad, cls, sep = tokenizer.require(PAD, CLS, SEP)
    cut = [[cls, *row[: context - 2], sep] for row in rows]
    return {"tokens": pad_rows(cut, pad), "mask": real_positions(cut)}
