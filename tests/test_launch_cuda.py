"""bench.launch_cuda: from Python to a driver that starts nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm import cuda

ROOT = Path(__file__).resolve().parent.parent
if sys.platform != "linux" or shutil.which("g++") is None:
    pytest.skip("needs Linux and g++", allow_module_level=True)
if not cuda.built():
    pytest.skip("fastlm._cuda is not built", allow_module_level=True)


def test_every_call_reaches_the_driver_once() -> None:
    command = [sys.executable, "-m", "bench.launch_cuda", "gelu", "--seconds", "0.001"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    heads, *rows = [line.split() for line in run.stdout.splitlines()]
    assert heads == ["op", "function", "dtype", "launches", "binding", "wrapper", "op"]
    assert len(rows) == 8
    for row in rows:
        at = row.index("forward") if "forward" in row else row.index("backward")
        assert row[at + 2] == "1" and all(float(value) > 0 for value in row[at + 3 :])
