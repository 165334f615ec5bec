"""What was measured on a CPU: bench/results/cpu-<model>.json, whole at any moment.

    {"device", "threads", "isa", "ceilings": {malloc: {"bandwidth", "product": {dtype: rate}}},
     "rows": [{"op", "shape", "dtype", "kind", "runs": {malloc: RUN}}]}
    RUN: {"values": {provider: seconds or bytes}, "bytes", "flops", "torch", "python", "commit"}

A run measured again replaces the one before; the others stay with the commit they were measured at.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cpu.items import Item, Target
from fastlm import native
from fastlm.data import atomic_file
from fastlm.info import cpu_model

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILED = ("compile", "plain compiled")
APART = ("fastlm", *COMPILED, "torch chunked")


def path_for(model: str, kind: str = "cpu") -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind} {model}".lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}.json"


def commit() -> str:
    """Of the sources; "-dirty" where they have changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


class Results:
    """The document of this machine; with a path, on disk after each addition."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"ceilings": {}, "rows": []}
        if path is not None and path.exists():
            self.data |= json.loads(path.read_text())
        self.data |= {"device": cpu_model(), "threads": torch.get_num_threads(), "isa": native.isa() or "no extension"}
        self.about = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}

    def row(self, item: Item) -> dict[str, Any]:
        """The item's row, made where there is none yet."""
        found = find(self.data, item.key)
        if found is None:
            found = {**dict(zip(("op", "shape", "dtype"), item.key, strict=True)), "kind": item.kind, "runs": {}}
            self.data["rows"].append(found)
        return found

    def has(self, item: Item, malloc: str) -> bool:
        """Whether it was measured already, at this commit."""
        runs = self.row(item)["runs"]
        names = [malloc] if malloc else list(runs)
        return bool(names) and all(runs.get(name, {}).get("commit") == self.about["commit"] for name in names)

    def add(self, item: Item, runs: Mapping[str, Mapping[str, Any]]) -> None:
        row = self.row(item)
        row["runs"] |= {malloc: {**run, **self.about} for malloc, run in runs.items()}
        self.data["rows"].sort(key=lambda r: (r["op"], r["shape"], r["dtype"]))
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        kept = {**self.data, "rows": [row for row in self.data["rows"] if row["runs"]]}
        with atomic_file(self.path) as file:
            file.write((json.dumps(kept, indent=1) + "\n").encode())


def find(data: Mapping[str, Any], key: tuple[str, str, str]) -> dict[str, Any] | None:
    return next((row for row in data["rows"] if (row["op"], row["shape"], row["dtype"]) == key), None)


def ours(row: Mapping[str, Any], malloc: str = "tuned") -> float | None:
    """fastlm's seconds or bytes. The trainer tunes malloc whatever its peer does, so a step has one figure."""
    for name in (malloc, "tuned", "default"):
        value = row["runs"].get(name, {}).get("values", {}).get("fastlm")
        if value is not None:
            return float(value)
    return None


def ratio(row: Mapping[str, Any], peers: Sequence[str], malloc: str) -> float | None:
    """The best of these peers over ours, or None where none of them was run."""
    values, mine = row["runs"].get(malloc, {}).get("values", {}), ours(row, malloc)
    found = [values[peer] for peer in peers if peer in values]
    return min(found) / mine if found and mine else None


def eager(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The peers that are PyTorch as it comes."""
    return tuple({p for run in row["runs"].values() for p in run["values"] if p not in APART})


def holds(row: Mapping[str, Any], target: Target) -> tuple[float | None, bool]:
    """The measured ratio of a target, and whether it is reached."""
    measured = ratio(row, [target.peer], target.malloc)
    return measured, measured is not None and measured >= target.least


def share(data: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Time at the measured ceilings over fastlm's, and the ceiling that takes longer; None where work is unknown."""
    for malloc in ("tuned", "default"):
        run, ceilings = row["runs"].get(malloc, {}), data["ceilings"].get(malloc)
        if ceilings and "flops" in run and "fastlm" in run["values"]:
            rate = ceilings["product"].get(row["dtype"], ceilings["product"]["float32"])
            moving, computing = run["bytes"] / ceilings["bandwidth"], run["flops"] / rate
            return (moving + computing) / run["values"]["fastlm"], "bandwidth" if moving > computing else "product"
    return None


def amount(row: Mapping[str, Any], value: float) -> str:
    return f"{value / 1e6:.0f} MB" if row["kind"] == "memory" else f"{value * 1e3:.{1 if value > 0.1 else 2}f} ms"
