"""A tiny text, its data folder, and runs that take a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlm.data import Dataset, from_paths, prepare
from fastlm.models import CausalLM
from fastlm.train import ModelOptions, Reporter, TrainConfig, Trainer
from fastlm.train.randomness import seed_everything

MODEL = ModelOptions(style="gpt2", layers=2, heads=2, width=32, context=16, dropout=0.1)
Make = Callable[..., Trainer]


def words(count: int) -> str:
    rng = random.Random(0)
    return " ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "ran\n"]) for _ in range(count))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(3000))
    return path


@pytest.fixture(scope="session")
def data(text: Path) -> Dataset:
    return prepare(from_paths([text]), text.parent / "data", "char")


@pytest.fixture
def make(data: Dataset, tmp_path: Path) -> Make:
    """make(**settings) -> a Trainer that writes to tmp_path/"run"."""

    def build(
        reporter: Reporter | None = None, model: ModelOptions = MODEL, use: Dataset = data, **settings: Any
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "out": tmp_path / "run", "steps": 20, "batch": 4, "warmup": 4, "threads": 1, "malloc": False,
            "precision": "fp32", "eval_every": 0, "eval_batches": 2, "save_every": 0, "log_every": 1,
            "tensorboard": False,
        }  # fmt: skip
        config = TrainConfig(**{**defaults, **settings})
        seed_everything(config.seed)
        return Trainer(CausalLM(model.config(use.tokenizer.vocab_size)), use, config, reporter)

    return build
