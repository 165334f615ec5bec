"""Logs, plot, and what a person sees."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from fastlm.train import LiveReporter, PlainReporter, Progress, plot_losses, read_log
from fastlm.train.log import RunLog
from fastlm.train.report import clock

HALF = Progress(50, 100, 0.5, 10.0, 10.0, 3.25, 12345.6, 1.0, 1e-3)
END = Progress(100, 100, 1.0, 20.0, 0.0, 3.0, 12345.6, 1.0, 1e-3)


def test_clock() -> None:
    assert [clock(s) for s in (0, 7, 59.6, 750, 3723, math.nan, math.inf)] == [
        "0:00", "0:07", "1:00", "12:30", "1:02:03", "-:--", "-:--",
    ]  # fmt: skip


def test_plain_lines() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, seconds=1e9)
    reporter.start(HALF)
    reporter.step(HALF)  # too soon
    reporter.evaluation(50, {"loss": 3.5})
    reporter.step(END)
    reporter.stop()
    assert stream.getvalue().splitlines() == [
        "resumed at step 50",
        "      step 50  validation loss 3.5000",
        "100%  step 100  loss 3.000  12,346 tokens/s  left 0:00",
    ]


def test_the_last_step_is_told_however_short_the_run() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, seconds=1e9)
    reporter.step(HALF)
    reporter.stop()
    assert stream.getvalue() == " 50%  step 50  loss 3.250  12,346 tokens/s  left 0:10\n"


def test_live_bar_fits_sixty_columns() -> None:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, color_system=None)
    reporter = LiveReporter(console)
    reporter.start(HALF)
    reporter.step(HALF)
    reporter.evaluation(50, {"loss": 3.5})
    reporter.message("a message")
    reporter.step(END)
    reporter.stop()
    text = stream.getvalue()
    for part in ("50%", "loss 3.250", "12,346 tokens/s", "left 0:10", "validation loss 3.5000", "a message", "100%"):
        assert part in text
    assert max(len(line) for line in text.replace("\r", "\n").splitlines() if "\x1b" not in line) <= 60


def test_log_of_a_resumed_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        log.write(step, train_loss=float(step))
    log.write(6, train_loss=math.inf)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "train_lo')  # killed in the middle of a line
    assert read_log(tmp_path / "log.jsonl")[-1] == {"step": 6, "train_loss": None}
    RunLog(tmp_path, 3, tensorboard=False).close()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    RunLog(tmp_path, 0, tensorboard=False).close()
    assert read_log(tmp_path / "log.jsonl") == []


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, train_loss=2.5, validation_loss=3.0)
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "validation/loss"]
    assert events.Scalars("train/loss")[0].value == 2.5


@pytest.mark.parametrize("baseline", [None, 3.6])
def test_plot(tmp_path: Path, baseline: float | None) -> None:
    rows = [{"step": i, "train_loss": 8 / i} for i in range(1, 50)] + [{"step": 10, "validation_loss": 2.0}]
    path = plot_losses(rows, tmp_path / "loss.png", title="t", tokens_per_byte=0.3, baseline=baseline)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plot_losses([], tmp_path / "empty.png").exists()


def test_log_lines_are_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.write(1, train_loss=math.nan)
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "train_loss": None}
