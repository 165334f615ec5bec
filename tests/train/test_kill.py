"""Real processes, really killed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ENDLESS = 10_000_000
SETTINGS = shlex.split(
    "--tokenizer char --style llama --layers 1 --heads 2 --width 32 --context 16 --dropout 0.1 --batch 2 "
    "--accumulate 2 --schedule constant --warmup 5 --eval-every 15 --eval-batches 1 --save-every 10 "
    "--threads 1 --no-tensorboard --precision fp32"
)


def start(*arguments: str) -> subprocess.Popen[str]:
    """fastlm ARGUMENTS in a process of its own, warnings as errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "fastlm.cli", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: str) -> str:
    process = start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0 and not err, err
    return out


def saved_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "last" / "checkpoint.json").read_text())["step"])
    except FileNotFoundError:  # not yet, or between two renames
        return 0


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    while saved_step(folder) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_killed_and_resumed_equals_uninterrupted(text: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start("train", str(text), *SETTINGS, "--out", str(killed), "--steps", str(ENDLESS))
    wait_for(killed, 20, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps = str(saved_step(killed) + 25)
    run("train", "--resume", str(killed), "--steps", steps)
    run("train", str(text), *SETTINGS, "--out", str(whole), "--steps", steps)
    for name in ("last/model.safetensors", "best/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    logs = []
    for folder in (killed, whole):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs.append([(r["step"], r.get("train_loss"), r.get("validation_loss")) for r in rows])
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_resume(text: Path, tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "a run"
    process = start("train", str(text), *SETTINGS, "--out", str(folder), "--steps", str(ENDLESS))
    wait_for(folder, 10, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code and not err, err
    assert "finishing this step, then saving" in out
    command = out.rpartition("To resume: ")[2].strip()
    assert command == f"fastlm train --resume {shlex.quote(str(folder))}"
    step = saved_step(folder)
    assert f"at step {step}" in out
    if number == signal.SIGINT:
        again = run(*shlex.split(command)[1:], "--steps", str(step + 5))
        assert f"resumed at step {step}" in again and "validation loss" in again and saved_step(folder) == step + 5
