"""The command line: help a person can read, errors in a line, and every verb once."""

from __future__ import annotations

import importlib.util
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import fastlm
from fastlm import cli
from fastlm.train import demo as demo_recipe

TINY = shlex.split(
    "--tokenizer byte --style gpt2 --layers 1 --heads 2 --width 16 --context 8 --batch 2 --steps 3 "
    "--warmup 1 --eval-batches 1 --threads 1 --no-malloc --no-tensorboard"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a text with a few words in it, é and all. " * 40)
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Exit code 2, one line on stderr."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_train_generate_resume(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", str(text), *TINY, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for part in ("validation loss", "perplexity", "bits per byte", "byte bigram", "weights on cpu"):
        assert part in said
    assert (out / "loss.png").exists() and json.loads((out / "run.json").read_text())["train"]["steps"] == 3

    assert cli.main(["generate", str(out), "--prompt", "a text é", "--tokens", "20", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["generate", str(out / "last"), "--prompt=a text é", "--tokens=20", "--seed=1"]) == 0
    assert capsys.readouterr().out == first and first.startswith("a text é")

    assert "holds a run already: continue it with --resume" in fails(capsys, "train", text, *TINY, "--out", out)
    assert cli.main(["train", "--resume", str(out), "--steps", "5"]) == 0
    assert "resumed at step 3" in capsys.readouterr().out
    assert "of another model: width is 16 there, 32 here" in fails(capsys, "train", "--resume", out, "--width", 32)
    assert "cannot change" in fails(capsys, "train", "--resume", out, "--tokenizer", "char")
    assert "leave out" in fails(capsys, "train", text, "--resume", out)
    assert "exclude each other" in fails(capsys, "train", "--resume", out, "--preset", "demo")
    assert cli.main(["train", str(text), *TINY, "--out", str(out), "--overwrite"]) == 0
    assert json.loads((out / "last" / "checkpoint.json").read_text())["step"] == 3


def test_wrong_input_takes_one_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "verb must be one of demo, train, generate, info, got 'tain'" in fails(capsys, "tain")
    assert "data is missing" in fails(capsys, "train")
    assert "nope.txt does not exist" in fails(capsys, "train", "nope.txt")
    assert "preset must be one of default, demo" in fails(capsys, "train", text, "--preset", "huge")
    assert "perhaps --lr?" in fails(capsys, "train", text, "--lrr", 3)
    assert "--lr: could not convert string to float: 'fast'" in fails(capsys, "train", text, "--lr", "fast")
    assert "batch must be an integer of at least 1, got 0" in fails(capsys, "train", text, "--batch", 0)
    out = tmp_path / "none"
    assert "width must be a multiple of heads" in fails(capsys, "train", text, "--heads", 3, "--out", out)
    assert "device must be auto, cpu, cuda" in fails(capsys, "train", text, "--device", "tpu", "--out", out)
    assert not out.exists(), "nothing is written before the settings are known to be right"
    assert "needs at least 100001" in fails(capsys, "train", text, "--context", 100_000, "--out", out)
    assert "no run to resume" in fails(capsys, "train", "--resume", tmp_path)
    assert "no run to resume" in fails(capsys, "demo", "--resume", "--out", tmp_path)
    assert "folder nowhere does not exist" in fails(capsys, "generate", "nowhere")
    assert "no checkpoint in" in fails(capsys, "generate", tmp_path)
    assert "PATH" in fails(capsys, "generate")


TASKS = {
    "mlm": ({"a.txt": "the cat sat on the mat\n" * 40}, "the [MASK] sat", ("nats per masked token", "commonest one")),
    "classify": (
        {"a.tsv": "1\ta good film\n0\ta bad one\n" * 20},
        "good",
        ("macro F1", "2 classes (0, 1)"),
    ),
    "tag": ({"a.conll": "Ann B-PER\nlives O\n\n" * 20 + "Bo B-PER\n"}, "Ann lives", ("span F1", "commonest tag")),
    "seq2seq": ({"a.en": "a b\nb c\nc d\n" * 9, "a.de": "b a\nc b\nd c\n" * 9}, "a b", ("BLEU", "27 pairs")),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    contents, prompt, expected = TASKS[task]
    files = [str(tmp_path / name) for name in contents]
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    out = str(tmp_path / "run")
    arguments = [*files, "--task", task, "--validation", *files, "--out", out, *TINY]
    assert cli.main(["train", *arguments]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in expected), said
    assert cli.main(["train", "--resume", out, "--steps", "4"]) == 0
    assert "resumed at step 3" in capsys.readouterr().out

    assert cli.main(["generate", out, "--prompt", prompt, "--tokens", "5"]) == 0
    one = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n{prompt}\n"))
    assert cli.main(["generate", out, "--tokens", "5"]) == 0
    assert capsys.readouterr().out == 2 * one and one.endswith("\n")


def test_wrong_tasks(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert "task must be one of lm, mlm" in fails(capsys, "train", text, "--task", "chat")
    assert "preset demo is of task lm, not tag" in fails(capsys, "train", text, "--task", "tag", "--preset", "demo")
    text.write_text("one\n")
    for task in ("classify", "tag", "seq2seq"):
        assert "text.txt:1 must" in fails(capsys, "train", text, "--task", task, "--out", out), task
    assert not out.exists()
    assert "width cannot change with --init" in fails(capsys, "train", text, "--init", tmp_path, "--width", 8)


def test_a_full_disk_is_a_failure_not_a_mistake(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        assert cli.main(["train", str(text), *TINY, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1


@pytest.mark.parametrize("columns", ["60", "100"])
@pytest.mark.parametrize("verb", ["demo", "train", "generate"])
def test_help(verb: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"fastlm {verb}" in text and "(default:" in text
    assert max(len(line) for line in text.splitlines()) <= int(columns)


def test_help_shows_the_defaults_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "shakespeare-char-cpu", "--help"])
    assert "(default: char)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(verb in usage for verb in ("demo", "train", "generate", "info"))
    assert cli.main(["--version"]) == 0 and fastlm.__version__ in capsys.readouterr().out


def test_info_works_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in cli.EXTRA else real(name))
    assert 'pip install "fastlm[train]"' in fails(capsys, "train", "x")
    assert cli.main(["info"]) == 0 and "versions" in capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of some seconds: the same path, a small corpus and model."""
    from dataclasses import replace

    import fastlm.train

    def small() -> Any:
        recipe = demo_recipe()
        return replace(
            recipe,
            text=replace(recipe.text, vocab=300),
            model=replace(recipe.model, layers=1, heads=2, width=32, context=32),
            train=replace(recipe.train, batch=4, eval_every=0, threads=1, malloc=False),
        )

    monkeypatch.setattr(fastlm.train, "demo", small)
    monkeypatch.setattr("fastlm.train.demonstration.MEGABYTES", 0.5)
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--minutes"]
    assert cli.main([*arguments, "0.02"]) == 0
    said = capsys.readouterr().out
    for part in (
        "Expect about", "Ctrl-C saves", "Corpus: standard library of Python", "layer_norm", "first choice", "tokens/s",
        "validation loss", "perplexity", "bits per byte", "byte bigram", "A sample", "loss.png", "tensorboard --logdir",
    ):  # fmt: skip
        assert part in said, part
    assert (out / "loss.png").exists() and (out / "best" / "model.safetensors").exists()
    assert list((out / "tensorboard").iterdir())
    assert cli.main([*arguments, "0.03", "--resume"]) == 0
    again = capsys.readouterr().out
    assert "resumed at step" in again and "A sample" in again
