"""Everything measured, in one JSON file that is whole at any moment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Record:
    """results.json of a folder: rows are added one by one and each addition is on disk when it returns.

    Keys: about (device, versions, commit), ceilings, rows, tests, sanitize, tune, dropped (what time did not suffice
    for), failed, progress (items tried in this invocation, by stage). A row replaces that of its stage and name.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.json"
        self.data: dict[str, Any] = {"about": {}, "ceilings": {}, "rows": [], "failed": [], "dropped": []}
        if self.path.exists():
            self.data |= json.loads(self.path.read_text())

    def write(self) -> None:
        """A new file in place of the old one, so that an interrupt leaves one of the two."""
        part = self.path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        key = (row["stage"], row["name"])
        self.data["rows"] = [r for r in self.data["rows"] if (r["stage"], r["name"]) != key] + [row]
        self.write()

    def note(self, key: str, stage: str, name: str, why: str) -> None:
        """Something dropped or failed; the newest word on an item counts."""
        kept = [n for n in self.data[key] if (n["stage"], n["name"]) != (stage, name)]
        self.set(key, [*kept, {"stage": stage, "name": name, "why": why}])

    def begin(self, stages: list[str]) -> None:
        """A new invocation: what these stages dropped and failed at before is forgotten, what they measured stays."""
        for key in ("failed", "dropped"):
            self.data[key] = [n for n in self.data[key] if n["stage"] not in stages]
        self.data["progress"] = {stage: [] for stage in stages}
        self.write()

    def done(self, stage: str) -> list[str]:
        return self.data.get("progress", {}).get(stage, [])

    def start(self, stage: str, name: str) -> None:
        """From here on the item counts as tried: a process that dies on it is not sent there again."""
        self.data["progress"].setdefault(stage, []).append(name)
        self.data["running"] = {"stage": stage, "name": name, "since": time.time()}
        self.write()

    def finish(self) -> None:
        self.set("running", None)


def about(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    import fastlm

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    found = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        from bench.gpu.items import ours

        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
            "backends": ours(),
        }
    return found
