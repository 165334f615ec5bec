"""A run from its text to its plot: what `fastlm train` and `fastlm demo` share."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlm.data import Corpus, atomic_file, atomic_folder, recover_folder
from fastlm.train import randomness
from fastlm.train.config import InitOptions, ModelOptions, Recipe, TextOptions, TrainConfig
from fastlm.train.log import LOG, PLOT, plot_losses, read_log
from fastlm.train.origin import copy_vectors, load_origin, start_from
from fastlm.train.report import Reporter
from fastlm.train.tasks import TASKS, Data, Model, Source, Task
from fastlm.train.trainer import Result, Trainer, pick_device

FILE = "run.json"
DATA = "data"


@dataclass
class Run:
    """A trainer with its data, and the recipe it follows.

    Attributes:
        baseline: the figure to beat: for lm bits per byte of a byte bigram on the validation text.
    """

    recipe: Recipe
    data: Data
    trainer: Trainer
    baseline: float

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    @property
    def folder(self) -> Path:
        return self.recipe.train.out


def start(recipe: Recipe, source: Source | Corpus, reporter: Reporter, overwrite: bool = False) -> Run:
    """A new run: its data prepared below recipe.train.out, the model initialised from the seed.

    Raises:
        ValueError: the folder holds a run already and `overwrite` is False; or the data is not what the task needs.
    """
    folder, task = recipe.train.out, TASKS[recipe.task]
    if not overwrite and holds_run(folder):
        raise ValueError(f"{folder} holds a run already: continue it with --resume {folder}, or choose another --out")
    task.config(recipe.model, None)  # a wrong shape raises before anything is touched
    pick_device(recipe.train.device)
    origin = load_origin(recipe.init.init, task) if recipe.init.init else None
    try:
        with atomic_folder(folder / DATA) as temporary:  # what cannot be read leaves the run that was there whole
            data, baseline = task.prepare(source, temporary, recipe.text, origin.tokenizer if origin else None)
            randomness.seed_everything(recipe.train.seed)
            if origin is not None:
                model = start_from(origin, task, data, recipe.model.dropout)
            else:
                model = task.model(task.config(recipe.model, data))
            if recipe.init.vectors is not None:
                reporter.message(copy_vectors(recipe.init.vectors, model, data.tokenizer))
    except BaseException:
        with suppress(OSError):  # there already, and not empty
            folder.rmdir()
        raise
    for name in ("best", "last", "best.old", "last.old", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (LOG, PLOT, FILE):
        (folder / name).unlink(missing_ok=True)
    run = _make(recipe, task.open(folder / DATA), model, reporter, baseline)
    _save(run)
    return run


def resume(recipe: Recipe, reporter: Reporter) -> Run:
    """Continue the run in recipe.train.out from its last checkpoint. Settings of the recipe count, not the saved ones.

    Raises:
        FileNotFoundError: there is no run, or none that got as far as a checkpoint.
        ValueError: it is damaged, or the recipe's model or text is another.
    """
    folder, task = recipe.train.out, TASKS[recipe.task]
    baseline = float(_read(folder)["baseline"])
    data = task.open(folder / DATA)
    if recipe.init.init is not None:  # its shape is not in the recipe
        model = task.model.load(folder / "last")
    else:
        model = task.model(task.config(recipe.model, data))
    run = _make(recipe, data, model, reporter, baseline)
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
            TextOptions(**content["text"]),
            ModelOptions(**content["model"]),
            TrainConfig(**content["train"]),
            content.get("task", "lm"),  # runs of before there were others
            InitOptions(**content.get("init", {})),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder) / FILE} is damaged or of another version of fastlm: {error}") from None
    return replace(recipe, train=replace(recipe.train, out=Path(folder)))  # it may have been moved


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint that a new run would overwrite."""
    recover_folder(folder / "last")
    return (folder / "last").exists()


def finish(run: Run) -> Path:
    """Draw the losses of a run, and for lm the byte bigram they are held against."""
    lm: dict[str, float] = {}
    if run.task.name == "lm":
        info = run.data.info
        lm = {"tokens_per_byte": info["validation_tokens"] / info["validation_bytes"], "baseline": run.baseline}
    return plot_losses(
        read_log(run.folder / LOG),
        run.folder / PLOT,
        title=f"{run.trainer.model.num_parameters() / 1e6:.2f} million weights on {_shorten(run.data.info['source'])}",
        unit=run.task.unit,
        **lm,
    )


def summary(run: Run, result: Result) -> str:
    """The figures of a finished run, a line each."""
    return "\n".join(run.task.summary(run.data, result.figures, run.baseline))


def _make(recipe: Recipe, data: Data, model: Model, reporter: Reporter, baseline: float) -> Run:
    model.embed.weight.requires_grad_(not recipe.init.freeze_vectors)
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
    with atomic_file(run.folder / FILE) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())


def _shorten(text: str) -> str:
    return text if len(text) <= 50 else "…" + text[-49:]
