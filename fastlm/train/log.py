"""What a run writes down: log.jsonl, TensorBoard events, loss.png."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from fastlm.data import atomic_file

LOG = "log.jsonl"
PLOT = "loss.png"


class RunLog:
    """One line of JSON per record in FOLDER/log.jsonl, and the same numbers as TensorBoard events.

    Args:
        folder: of the run.
        step: the step the run starts from; records beyond it, from a run that got further than its checkpoint, go.
        tensorboard: write events too, below FOLDER/tensorboard.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        kept = [row for row in read_log(self.path) if row["step"] <= step] if step else []
        with atomic_file(self.path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        """Record numbers of a step. What is not finite is written as null, which JSON has."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut off by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def plot_losses(
    rows: list[dict[str, Any]],
    path: Path,
    *,
    title: str = "Loss",
    unit: str = "token",
    tokens_per_byte: float | None = None,
    baseline: float | None = None,
) -> Path:
    """Draw training and validation loss over the steps into a PNG.

    Args:
        rows: of read_log().
        unit: what the loss is counted per.
        tokens_per_byte: tokens per byte of the validation text; adds a second scale in bits per byte.
        baseline: bits per byte of a byte-bigram model, drawn as a line; needs tokens_per_byte.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves: list[tuple[str, str, dict[str, Any]]] = [
        ("train_loss", "training", {"color": "#7aa6d8", "linewidth": 1.0}),
        ("validation_loss", "validation", {"color": "#b3202c", "linewidth": 2.0, "marker": "o", "markersize": 4}),
    ]
    for name, label, style in curves:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.3)
    if tokens_per_byte:
        scale = tokens_per_byte / math.log(2)

        def to_bits(y: Any) -> Any:
            return y * scale

        def to_nats(y: Any) -> Any:
            return y / scale

        second = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
        second.set_ylabel("bits per byte")
        if baseline is not None:
            axes.axhline(
                baseline / scale, color="#555555", linestyle="--", label=f"byte bigram: {baseline:.2f} bits per byte"
            )
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    return path
