"""tune_malloc(), each time in a process of its own: what it sets lasts as long as the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

import fastlm
from fastlm import _malloc

FAULTS = """
import resource, sys, torch, fastlm
if sys.argv[1] == "tuned":
    assert fastlm.tune_malloc() and fastlm.tune_malloc()
x = torch.ones(9_000_000)  # 36 MB: above the 32 MiB that glibc keeps by itself
def run():
    return x.add(1).mul(2).sum().item()
results = {run() for _ in range(15)}  # alignment splits blocks: it takes some runs until each finds one that fits
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
results |= {run() for _ in range(5)}
assert results == {4.0 * 9_000_000}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(_malloc.missing() is not None, reason=str(_malloc.missing()))
def test_page_faults_go_away() -> None:
    default, tuned = faults("default"), faults("tuned")
    if default < 10_000:
        pytest.skip(f"this system's default malloc keeps large blocks ({default} page faults)")
    assert tuned < default / 10


def test_elsewhere_it_does_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str | None) -> Any:
        raise OSError(f"{name} not found")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(sys, "platform", "linux")
    assert fastlm.tune_malloc() is False and _malloc.missing() == "the C library is not glibc"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fastlm.tune_malloc() is False and "darwin" in str(_malloc.missing())
