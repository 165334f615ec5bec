"""Every task: trains, validates, saves, resumes bit for bit, answers."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.train import InitOptions, ModelOptions, Recipe, Reporter, TextOptions, TrainConfig, read_checkpoint
from fastlm.train.generate import Trained, load_model
from fastlm.train.run import Run, finish, resume, saved_recipe, start, summary
from fastlm.train.tasks import TASKS, Source

GOOD, BAD = ["fine", "lovely", "great"], ["poor", "awful", "bad"]
NOUNS = {"film": "Film", "plot": "Plot", "star": "Stern"}
KINDS = sorted(TASKS)


def sentences(count: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [
        ["the", rng.choice(list(NOUNS)), "is", rng.choice(GOOD + BAD), *["really"] * rng.randrange(3)]
        for _ in range(count)
    ]


def write(folder: Path, count: int, seed: int) -> dict[str, tuple[Path, ...]]:
    """A file or two for each task, all of the same sentences."""
    rows = sentences(count, seed)
    lines = {
        "text.txt": [" ".join(row) for row in rows],
        "table.tsv": [f"{'good' if set(row) & set(GOOD) else 'bad'}\t{' '.join(row)}" for row in rows],
        "columns.conll": ["\n".join(f"{w} {'B-N' if w in NOUNS else 'O'}" for w in row) + "\n" for row in rows],
        "source.en": [" ".join(row) for row in rows],
        "target.de": [" ".join(NOUNS.get(w, w) for w in row) for row in rows],
    }
    folder.mkdir(exist_ok=True)
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    text = (folder / "text.txt",)
    return {
        "lm": text, "mlm": text, "classify": (folder / "table.tsv",), "tag": (folder / "columns.conll",),
        "seq2seq": (folder / "source.en", folder / "target.de"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("data")
    train, held_out = write(folder / "train", 300, 0), write(folder / "validation", 40, 1)
    return {task: Source(train[task], held_out[task]) for task in train}


def recipe(task: str, out: Path, **settings: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "steps": 12, "batch": 8, "accumulate": 2, "warmup": 2, "lr": 5e-3, "threads": 1, "malloc": False,
        "precision": "fp32", "eval_every": 5, "eval_batches": 2, "save_every": 0, "log_every": 1, "tensorboard": False,
    }  # fmt: skip
    return Recipe(
        TextOptions("bpe", 300) if task == "seq2seq" else TextOptions("word", 64),
        ModelOptions("gpt2", layers=1, heads=2, width=32, context=16, dropout=0.1),
        TrainConfig(out=out, **{**defaults, **settings}), task,
    )  # fmt: skip


def trained(run: Run) -> dict[str, torch.Tensor]:
    return run.trainer.model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(task: str, files: dict[str, Source], tmp_path: Path) -> None:
    whole = start(recipe(task, tmp_path / "whole"), files[task], Reporter())
    result = whole.trainer.fit()
    half = start(recipe(task, tmp_path / "half"), files[task], Reporter())
    half.trainer.reporter = _Stop(half, 7)
    assert half.trainer.fit().stopped == "interrupted"
    again = resume(saved_recipe(tmp_path / "half"), Reporter())
    assert again.trainer.step == 7 and again.recipe.task == task
    figures = again.trainer.fit().figures
    assert figures == result.figures and same(trained(again), trained(whole))
    meta = read_checkpoint(tmp_path / "half" / "best")
    assert meta["task"] == task and meta["best"] is not None
    assert summary(again, result).count("\n") >= 1 and finish(again).exists()
    assert (tmp_path / "half" / "data" / "tokenizer.json").exists()


class _Stop(Reporter):
    def __init__(self, run: Run, step: int) -> None:
        self.run, self.at = run, step

    def step(self, progress: Any) -> None:
        if progress.step == self.at:
            self.run.trainer._asked = "interrupted"


def learnt(task: str, files: dict[str, Source], out: Path, **settings: Any) -> tuple[Run, Any, Trained]:
    """A run long enough to have learnt the little there is."""
    run = start(recipe(task, out, accumulate=1, eval_every=0, eval_batches=0, **settings), files[task], Reporter())
    return run, run.trainer.fit(), load_model(out)


def answers(model: Trained, *texts: str) -> list[str]:
    return list(model.answers(texts, beams=2, tokens=10))


def test_classify(files: dict[str, Source], tmp_path: Path) -> None:
    run, result, model = learnt("classify", files, tmp_path, steps=60)
    assert result.figures["accuracy"] > max(0.95, run.baseline) and 0.4 < run.baseline < 0.7
    assert result.figures["macro_f1"] > 0.95
    assert model.labels == ("bad", "good")
    assert answers(model, "the plot is great", "awful") == ["good\tthe plot is great", "bad\tawful"]


def test_tag(files: dict[str, Source], tmp_path: Path) -> None:
    run, result, model = learnt("tag", files, tmp_path, steps=60)
    assert result.figures["span_f1"] > 0.95 and result.figures["accuracy"] > max(0.95, run.baseline)
    assert answers(model, "the star is", "") == ["the\tO\nstar\tB-N\nis\tO\n", ""]
    words = [word for noun in NOUNS for word in ("the", noun, "is", *BAD)]
    (long,) = answers(model, " ".join(words))
    assert [line.partition("\t")[0] for line in long.splitlines()] == words, "longer than the context"
    assert long.startswith("the\tO\nfilm\tB-N\nis\tO\npoor\tO\n")


def test_seq2seq(files: dict[str, Source], tmp_path: Path) -> None:
    run, result, model = learnt("seq2seq", files, tmp_path, steps=80, lr=1e-2)
    assert result.figures["bleu"] > run.baseline + 5 > 5
    translation, nothing = answers(model, "the star is bad", " ")
    assert translation.startswith("the ") and nothing == ""


def test_mlm(files: dict[str, Source], tmp_path: Path) -> None:
    run, result, model = learnt("mlm", files, tmp_path, steps=40)
    assert result.figures["loss"] < math.log(run.data.tokenizer.vocab_size) - 0.3 and 0 < run.baseline < 0.5
    before, guess, after = answers(model, "the film [MASK] great")[0].partition(" great")
    assert before.startswith("the film ") and guess == " great" and not after and "[MASK]" not in before
    assert answers(model, "the film is great") == ["the film is great"]


def test_a_classifier_starts_from_an_encoder(files: dict[str, Source], tmp_path: Path) -> None:
    """Its blocks are taken over, its head is new; and so again from the classifier, whose head fits."""
    encoder = start(recipe("mlm", tmp_path / "mlm", steps=2), files["mlm"], Reporter())
    encoder.trainer.fit()
    first = replace(recipe("classify", tmp_path / "first", steps=0), init=InitOptions(init=tmp_path / "mlm" / "last"))
    run = start(first, files["classify"], Reporter())
    old, new = trained(encoder), trained(run)
    shared = [name for name in old if name in new]
    assert {"embed.weight", "blocks.0.mlp.up.weight"} <= set(shared) and "head.weight" not in old
    assert all(torch.equal(old[name], new[name]) for name in shared)
    assert run.data.tokenizer.fingerprint == encoder.data.tokenizer.fingerprint
    run.trainer.fit()
    again = resume(saved_recipe(tmp_path / "first"), Reporter())
    assert same(trained(again), new), "resumed without the run it started from"
    second = replace(first, init=InitOptions(init=tmp_path / "first"), train=replace(first.train, out=tmp_path / "b"))
    assert same(trained(start(second, files["classify"], Reporter())), new)


def test_what_cannot_be_started_from(files: dict[str, Source], tmp_path: Path) -> None:
    start(recipe("lm", tmp_path / "lm", steps=0), files["lm"], Reporter()).trainer.fit()
    base = recipe("classify", tmp_path / "run")
    for init, error, message in (
        (tmp_path / "lm" / "last", ValueError, "holds a CausalLM, task classify trains a MaskedLM"),
        (tmp_path, FileNotFoundError, "no checkpoint in"),
    ):
        with pytest.raises(error, match=message):
            start(replace(base, init=InitOptions(init=init)), files["classify"], Reporter())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="exclude each other"):
        InitOptions(init=tmp_path, vectors=tmp_path)
    with pytest.raises(ValueError, match="needs vectors"):
        InitOptions(freeze_vectors=True)


def test_a_folder_of_transformers(files: dict[str, Source], tmp_path: Path) -> None:
    encoder = start(recipe("mlm", tmp_path / "mlm", steps=0), files["mlm"], Reporter())
    folder = tmp_path / "hf"
    encoder.trainer.model.to_hf(folder)
    encoder.data.tokenizer.save(folder)
    run = start(replace(recipe("mlm", tmp_path / "run"), init=InitOptions(init=folder)), files["mlm"], Reporter())
    old, new = trained(encoder), trained(run)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_word_vectors(files: dict[str, Source], tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("".join(f"{word} {' '.join(f'{i}.5' for _ in range(32))}\n" for i, word in enumerate(GOOD + BAD)))
    options = InitOptions(vectors=path, freeze_vectors=True)
    messages: list[str] = []
    reporter = Reporter()
    reporter.message = messages.append  # type: ignore[method-assign]
    run = start(replace(recipe("classify", tmp_path / "run", steps=3), init=options), files["classify"], reporter)
    assert messages == [f"6 of {run.data.tokenizer.vocab_size - 4} words have a vector in {path}"]
    embed = run.trainer.model.embed.weight
    before = embed.detach().clone()
    assert before[run.data.tokenizer.encode(GOOD[1])[0]].tolist() == [1.5] * 32
    run.trainer.fit()
    assert torch.equal(embed, before) and not embed.requires_grad
    path.unlink()
    again = resume(replace(saved_recipe(tmp_path / "run"), train=replace(run.recipe.train, steps=5)), Reporter())
    again.trainer.fit()
    assert torch.equal(again.trainer.model.embed.weight, before), "still frozen"
    path.write_text("fine 1 2 3\n")
    with pytest.raises(ValueError, match=r"vectors[.]txt"):
        start(replace(recipe("classify", tmp_path / "run"), init=options), files["classify"], Reporter(), True)
    assert (tmp_path / "run" / "last").exists(), "the run that was there is whole"
    byte = replace(recipe("lm", tmp_path / "byte"), text=TextOptions("byte"), init=options)
    with pytest.raises(ValueError, match="vectors need the tokenizer word, got byte"):
        start(byte, files["lm"], Reporter())


def test_options_of_other_families(files: dict[str, Source], tmp_path: Path) -> None:
    for task, name in (("lm", "decoder_layers"), ("classify", "kv_heads"), ("seq2seq", "kv_heads")):
        base = recipe(task, tmp_path / "run")
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            start(replace(base, model=replace(base.model, **{name: 1})), files[task], Reporter())
    with pytest.raises(ValueError, match="bpe, char or byte for seq2seq"):
        start(replace(recipe("seq2seq", tmp_path / "run"), text=TextOptions("word")), files["seq2seq"], Reporter())
    with pytest.raises(ValueError, match="validation must be one file"):
        two = Source(files["tag"].paths, files["tag"].validation * 2)
        start(recipe("tag", tmp_path / "run"), two, Reporter())
