"""What the trainer and the command line ask of a family of models. The loop itself knows none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastlm.data import IGNORE, Corpus, Tokenizer
from fastlm.models import CausalLM, CausalLMConfig, MaskedLM, MaskedLMConfig, Seq2SeqLM, Seq2SeqLMConfig
from fastlm.train.config import ModelOptions, TextOptions

Model = CausalLM | MaskedLM | Seq2SeqLM
Config = CausalLMConfig | MaskedLMConfig | Seq2SeqLMConfig
Batch = dict[str, Tensor]


class Batches(Protocol):
    """Batch i is a function of the seed and i."""

    def __getitem__(self, number: int, /) -> Batch: ...


class FiniteBatches(Batches, Protocol):
    """Every target of the validation data once."""

    def __len__(self) -> int: ...


class Data(Protocol):
    """Prepared data in a folder.

    Attributes:
        info: "source", "sha256" of everything in it, and whatever is worth telling.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def info(self) -> dict[str, Any]: ...

    def train_batches(self, batch: int, seed: int, context: int) -> Batches: ...

    def validation_batches(self, batch: int, context: int) -> FiniteBatches: ...


@dataclass(frozen=True)
class Source:
    """What the command line was given."""

    paths: tuple[Path, ...]
    validation: tuple[Path, ...] = ()


class Measure:
    """The loss, added up over batches."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.targets: Tensor | int = 0

    def add(self, model: Model, batch: Batch) -> None:
        """One more batch."""
        self.targets = self.targets + count_targets(batch)
        self.total = self.total + model(**batch, reduction="sum").loss.double()

    def figures(self) -> dict[str, float]:
        """What all batches together give; "loss" is nats per target."""
        return {"loss": float(self.total) / int(self.targets)}


class Task(ABC):
    """A family of models on one kind of data.

    Attributes:
        name: of --task.
        unit: what the loss is counted per.
        model: the class of its models.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "token"
    model: ClassVar[Any]

    @abstractmethod
    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[Data, float]:
        """Read the data and write it to a folder; also the figure a model must beat, NaN if there is none.

        Args:
            tokenizer: of the model to start from; None makes one as the options say.
        """

    @abstractmethod
    def open(self, folder: Path) -> Data:
        """What prepare() wrote."""

    @abstractmethod
    def config(self, options: ModelOptions, data: Data | None) -> Config:
        """The model's config; without data, one of the same shape, to find out whether there can be such a model."""

    def adapt(self, model: Model, labels: Sequence[str], data: Data) -> Model:
        """A trained model for this task and data.

        Args:
            labels: what its head tells apart.
        """
        return model

    def facts(self, data: Data) -> str:
        """A line about the data."""
        info = data.info
        return (
            f"{info['train_tokens']:,} tokens to train on, {info['validation_tokens']:,} to validate, vocabulary "
            f"{info['vocab_size']} ({info['tokenizer']})"
        )

    def decisive(self, figures: dict[str, float]) -> str:
        """best/ is the model with the best of this figure: the lowest loss, the highest of anything else."""
        return "loss"

    def measure(self, data: Data) -> Measure:
        """A new sum."""
        return Measure()

    def conclude(
        self, model: Model, data: Data, figures: dict[str, float], targets: int, pulse: Callable[[], None]
    ) -> dict[str, float]:
        """Figures to add at the end of a run.

        Args:
            figures, targets: of the whole validation data, and the number of targets in it.
            pulse: to be called now and then; raises when the run shall stop.
        """
        return {}

    @abstractmethod
    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        """The figures of a finished run, a line each."""

    def answers(
        self, model: Model, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[str], beams: int, tokens: int
    ) -> Iterator[str]:
        """What a trained model makes of each text.

        Args:
            beams, tokens: hypotheses and longest answer, where the answer is text.
        """
        raise NotImplementedError(self.name)


def count_targets(batch: Batch) -> Tensor:
    """Targets that take part."""
    return (batch["targets"] != IGNORE).sum()


def count_tokens(batch: Batch) -> int:
    """Tokens that go through the model, padding left out where a mask tells it."""
    total = 0
    for name, mask in (("tokens", "mask"), ("source", "source_mask")):
        if name in batch:
            real = batch.get(mask)
            total += batch[name].numel() if real is None else int(real.sum())
    return total


@torch.no_grad()
def predict(model: Model, batch: Batch) -> Tensor:
    """Logits of a batch without targets, on the model's device."""
    device = model.embed.weight.device
    logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
    assert logits is not None
    return logits


def refuse(options: ModelOptions, task: str, *names: str) -> None:
    """Raises ValueError for options that the task's model does not have."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{name} must be left out: a model of task {task} has no such thing")
