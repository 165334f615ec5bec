"""A run from its text to its plot: what `fastlm train` and `fastlm demo` share."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlm.data import Corpus, Dataset, atomic_file, prepare, recover_folder
from fastlm.metrics import bigram_bits_per_byte
from fastlm.models import CausalLM
from fastlm.train import randomness
from fastlm.train.config import ModelOptions, Recipe, TextOptions, TrainConfig
from fastlm.train.log import LOG, PLOT, plot_losses, read_log
from fastlm.train.report import Reporter
from fastlm.train.trainer import Result, Trainer, pick_device

FILE = "run.json"
DATA = "data"


@dataclass
class Run:
    """A trainer with its data, and the recipe it follows.

    Attributes:
        baseline: bits per byte of a byte-bigram model on the validation text.
    """

    recipe: Recipe
    data: Dataset
    trainer: Trainer
    baseline: float

    @property
    def folder(self) -> Path:
        return self.recipe.train.out


def start(recipe: Recipe, corpus: Corpus, reporter: Reporter, overwrite: bool = False) -> Run:
    """A new run: tokenizer and shards written below recipe.train.out, the model initialised from the seed.

    Raises:
        ValueError: the folder holds a run already and `overwrite` is False.
    """
    folder = recipe.train.out
    if not overwrite and holds_run(folder):
        raise ValueError(f"{folder} holds a run already: continue it with --resume {folder}, or choose another --out")
    recipe.model.config(vocab_size=1 << 16)  # a wrong shape raises before anything is touched
    pick_device(recipe.train.device)
    for name in ("best", "last", "best.old", "last.old", "tensorboard", DATA):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (LOG, PLOT, FILE):
        (folder / name).unlink(missing_ok=True)
    data = prepare(corpus, folder / DATA, recipe.text.tokenizer, recipe.text.vocab)
    run = _make(recipe, data, reporter, bigram_bits_per_byte(corpus.train, corpus.validation))
    _save(run)
    return run


def resume(recipe: Recipe, reporter: Reporter) -> Run:
    """Continue the run in recipe.train.out from its last checkpoint. Settings of the recipe count, not the saved ones.

    Raises:
        FileNotFoundError: there is no run, or none that got as far as a checkpoint.
        ValueError: it is damaged, or the recipe's model or text is another.
    """
    folder = recipe.train.out
    baseline = float(_read(folder)["baseline"])
    run = _make(recipe, Dataset.open(folder / DATA), reporter, baseline)
    run.trainer.resume()
    _save(run)
    return run


def saved_recipe(folder: str | Path) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        FileNotFoundError: no run there.
        ValueError: its run.json is damaged or of another version.
    """
    content = _read(Path(folder))
    try:
        recipe = Recipe(
            TextOptions(**content["text"]), ModelOptions(**content["model"]), TrainConfig(**content["train"])
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder) / FILE} is damaged or of another version of fastlm: {error}") from None
    return replace(recipe, train=replace(recipe.train, out=Path(folder)))  # it may have been moved


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint that a new run would overwrite."""
    recover_folder(folder / "last")
    return (folder / "last").exists()


def finish(run: Run) -> Path:
    """Draw the losses of a run and the byte bigram they are held against."""
    return plot_losses(
        read_log(run.folder / LOG),
        run.folder / PLOT,
        title=f"{run.trainer.model.num_parameters() / 1e6:.2f} million weights on {_shorten(run.data.info['source'])}",
        tokens_per_byte=run.trainer.validation.targets / run.data.validation_bytes,
        baseline=run.baseline,
    )


def summary(run: Run, result: Result) -> str:
    """The figures of a finished run, a line each."""
    lines = [f"validation loss  {result.validation_loss:.4f} nats per token, whole validation text"]
    if math.isfinite(result.perplexity):
        lines.append(f"perplexity       {result.perplexity:.2f} per token, of {run.data.tokenizer.vocab_size} tokens")
    verdict = "below" if result.bits_per_byte < run.baseline else "NOT below"
    lines += [
        f"bits per byte    {result.bits_per_byte:.3f}",
        f"byte bigram      {run.baseline:.3f} bits per byte on the same text; the model is {verdict} it",
    ]
    return "\n".join(lines)


def _make(recipe: Recipe, data: Dataset, reporter: Reporter, baseline: float) -> Run:
    randomness.seed_everything(recipe.train.seed)
    model = CausalLM(recipe.model.config(data.tokenizer.vocab_size))
    return Run(recipe, data, Trainer(model, data, recipe.train, reporter), baseline)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no run to resume in {folder}: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        float(content["baseline"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version of fastlm: {error!r}") from None
    return dict(content)


def _save(run: Run) -> None:
    content: dict[str, Any] = {**asdict(run.recipe), "baseline": run.baseline}
    content["train"]["out"] = str(run.folder)
    with atomic_file(run.folder / FILE) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _shorten(text: str) -> str:
    return text if len(text) <= 50 else "…" + text[-49:]
