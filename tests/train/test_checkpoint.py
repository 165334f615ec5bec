"""Checkpoints: whole or not there; what does not fit is refused before anything changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.data import from_paths, prepare
from fastlm.train import ModelOptions, Trainer, find_checkpoint, read_checkpoint
from fastlm.train.checkpoint import read_state
from fastlm.train.generate import load_model

from .conftest import MODEL, Make, words


@pytest.fixture
def run(make: Make, tmp_path: Path) -> Path:
    """A finished run of 5 steps."""
    make(steps=5).fit()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refuses(trainer: Trainer, error: type[Exception], message: str) -> None:
    """resume() raises and leaves weights, optimizer, step and generators as they were."""
    before = [p.clone() for p in trainer.model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        trainer.resume()
    assert trainer.step == 0 and not trainer.optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["truncated", "damaged", "missing"])
def test_broken_files(make: Make, run: Path, name: str, how: str) -> None:
    path = run / "last" / name
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "damaged":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    refuses(make(), ValueError, f"{name.replace('.', '[.]')}.* {how}")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "damaged"), ("{}", "damaged"), ("[1]", "damaged"), ('{"format": "x", "files": {}}', "format 'x'")],
)
def test_broken_list(make: Make, run: Path, content: str, message: str) -> None:
    (run / "last" / "checkpoint.json").write_text(content)
    refuses(make(), ValueError, f"checkpoint[.]json .*{message}")


def test_nothing_there(make: Make, run: Path) -> None:
    shutil.rmtree(run / "last")
    refuses(make(), FileNotFoundError, "no checkpoint in .*last")
    os.rename(run / "best", run / "last")
    refuses(make(), FileNotFoundError, "cannot be resumed from: it has no state.pt")


def test_another_model(make: Make, run: Path) -> None:
    other = ModelOptions(style="gpt2", layers=3, heads=2, width=32, context=16, dropout=0.1)
    refuses(make(model=other), ValueError, "of another model: layers is 2 there, 3 here")


def test_another_tokenizer_and_another_text(make: Make, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text(words(2000))
    same_alphabet = prepare(from_paths([path]), tmp_path / "other", "char")
    refuses(make(use=same_alphabet), ValueError, "trained on text [0-9a-f]{12}, the data in .* is")
    path.write_text(words(2000).replace("m", "z"))
    other = prepare(from_paths([path]), tmp_path / "another", "char")
    assert other.tokenizer.vocab_size == same_alphabet.tokenizer.vocab_size
    refuses(make(use=other), ValueError, "trained with tokenizer")


def test_a_model_of_another_vocabulary_cannot_generate(make: Make, run: Path, tmp_path: Path) -> None:
    best = run / "best"
    content = json.loads((best / "tokenizer.json").read_text())
    content["characters"] += "!"
    (best / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer[.]json is truncated or damaged"):
        load_model(run)


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_as_torch_says(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("torch.save", full_disk),
        ("torch.save", full_disk_as_torch_says),
        ("safetensors.torch.save_file", full_disk),
        ("os.fsync", full_disk),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    make: Make, run: Path, monkeypatch: pytest.MonkeyPatch, target: str, fault: Any
) -> None:
    before = contents(run / "last")
    trainer = make(steps=8, out=run)
    trainer.resume()
    trainer._advance(_NoLog())  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(OSError, match=r"could not save .*last: .*the checkpoint there before, .*last, is whole"):
            trainer.save("last")
    assert contents(run / "last") == before
    assert {p.name for p in run.iterdir()} == {"best", "last", "log.jsonl"}, "no leftovers"
    again = make(out=run)
    again.resume()
    assert again.step == 5


class _NoLog:
    def write(self, step: int, **values: float) -> None:
        pass


def test_a_crash_between_the_renames(make: Make, run: Path) -> None:
    os.rename(run / "last", run / "last.old")
    trainer = make()
    trainer.resume()
    assert trainer.step == 5


def test_find(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run) == run / "best"
    assert find_checkpoint(run / "last") == run / "last"
    shutil.rmtree(run / "best")
    assert find_checkpoint(run) == run / "last"
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither checkpoint[.]json nor best/ nor last/"):
        find_checkpoint(tmp_path / "empty")


def test_nothing_in_the_state_can_run_code(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    torch.save({"optimizer": Evil(), "random": {}}, run / "last" / "state.pt")
    with pytest.raises(ValueError, match=r"state[.]pt is damaged"):
        read_state(run / "last")
    assert not marker.exists()


def test_what_is_recorded(run: Path) -> None:
    meta = read_checkpoint(run / "last")
    assert meta["step"] == 5 and meta["train"]["batch"] == 4 and meta["fastlm"] and meta["torch"]
    assert meta["best"] > 0 and meta["seconds"] > 0 and set(MODEL.__dict__)
