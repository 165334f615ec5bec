"""Telling a person how a run goes: nothing, plain lines, or a live bar."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Times in seconds; what is not known is NaN.

    Attributes:
        step, steps: done and, if the run is counted, in all.
        fraction: of the run that is over.
        elapsed, left: seconds.
        loss: of the last step, nats per target.
        speed: tokens per second, padding left out; averaged over about ten steps.
    """

    step: int
    steps: int | None
    fraction: float
    elapsed: float
    left: float
    loss: float
    speed: float
    grad_norm: float
    lr: float


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:02:03; -:-- for what is not known."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _listed(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


class Reporter:
    """Says nothing; the others override it."""

    def start(self, progress: Progress) -> None:
        """The run begins, or goes on."""

    def step(self, progress: Progress) -> None:
        """A step is done."""

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Figures on the validation data were found, "loss" first."""

    def message(self, text: str) -> None:
        """Something to know."""

    def stop(self) -> None:
        """The run is over, whichever way."""


class PlainReporter(Reporter):
    """A line every few seconds, for logs and pipes.

    Args:
        stream: where to.
        seconds: between two lines.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 5.0) -> None:
        self.stream = stream or sys.stdout
        self.seconds = seconds
        self._last = 0.0
        self._unsaid: Progress | None = None

    def start(self, progress: Progress) -> None:
        self._last = time.monotonic()
        if progress.step:
            self.message(f"resumed at step {progress.step}")

    def step(self, progress: Progress) -> None:
        if time.monotonic() - self._last < self.seconds and progress.fraction < 1:
            self._unsaid = progress
            return
        self._last = time.monotonic()
        self._say(progress)

    def stop(self) -> None:
        if self._unsaid is not None:  # a run that the clock ends has no step at which it is all over
            self._say(self._unsaid)

    def _say(self, p: Progress) -> None:
        self._unsaid = None
        self.message(
            f"{p.fraction:4.0%}  step {p.step}  loss {p.loss:.3f}  {p.speed:,.0f} tokens/s  left {clock(p.left)}"
        )

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        self.message(f"      step {step}  validation {_listed(figures)}")

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class LiveReporter(Reporter):
    """A bar that stays in one place, messages above it. It fits 60 columns."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console()
        self._bar: Any = None
        self._task: Any = None
        self._drawn = 0.0

    def start(self, progress: Progress) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            auto_refresh=False,  # no thread beside the two that compute
            expand=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=1.0, completed=progress.fraction, text="")
        if progress.step:
            self.message(f"resumed at step {progress.step}")

    def step(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._bar is None or (now - self._drawn < 0.2 and progress.fraction < 1):
            return
        self._drawn = now
        p = progress
        text = f"loss {p.loss:.3f}  {p.speed:,.0f} tokens/s  left {clock(p.left)}"
        self._bar.update(self._task, completed=p.fraction, text=text, refresh=True)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        self.message(f"step {step}: validation {_listed(figures)}")

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)
        if self._bar is not None:
            self._bar.refresh()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_reporter() -> Reporter:
    """A live bar on a terminal, plain lines elsewhere."""
    return LiveReporter() if sys.stdout.isatty() else PlainReporter()
