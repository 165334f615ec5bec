"""What a run's weights start from: chance, another model, word vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fastlm.data import Tokenizer, WordTokenizer, load_tokenizer
from fastlm.models import load_word_vectors
from fastlm.train.checkpoint import find_checkpoint
from fastlm.train.generate import load_model
from fastlm.train.tasks import Data, Model, Task


@dataclass(frozen=True)
class Origin:
    """A model to start from.

    Attributes:
        labels: what its head tells apart; empty where that is unknown.
    """

    model: Model
    tokenizer: Tokenizer
    labels: tuple[str, ...]


def load_origin(folder: Path, task: Task) -> Origin:
    """The model of a run, of a checkpoint, or of a folder that transformers wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a family that the task does not train.
    """
    try:
        find_checkpoint(folder)
    except FileNotFoundError:
        if not (folder / "config.json").is_file():
            raise
        origin = Origin(task.model.from_hf(folder), load_tokenizer(folder), ())
    else:
        found = load_model(folder)
        origin = Origin(found.model, found.tokenizer, found.labels)
    if not isinstance(origin.model, task.model):
        raise ValueError(
            f"init: {folder} holds a {type(origin.model).__name__}, task {task.name} trains a {task.model.__name__}"
        )
    return origin


def start_from(origin: Origin, task: Task, data: Data, dropout: float) -> Model:
    """The task's model with the weights of another."""
    kept = task.adapt(origin.model, origin.labels, data)
    model = task.model(replace(kept.config, dropout=dropout))
    model.load_state_dict(kept.state_dict())
    return model


def copy_vectors(path: Path, model: Model, tokenizer: Tokenizer) -> str:
    """Word vectors into the embedding; says for how many words there were any.

    Raises:
        ValueError: the tokenizer has no words; or the file is damaged, of another width, or of other words.
    """
    if not isinstance(tokenizer, WordTokenizer):
        raise ValueError(f"vectors need the tokenizer word, got {tokenizer.kind}")
    found = load_word_vectors(model.embed, path, tokenizer.words)
    return f"{found:,} of {len(tokenizer.words):,} words have a vector in {path}"
