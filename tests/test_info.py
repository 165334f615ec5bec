"""fastlm info: complete, with reasons, and without anything but torch and numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm import info, native
from fastlm._dispatch import Op, Request

ROOT = Path(__file__).resolve().parent.parent


def test_every_op_and_backend_is_there_with_reasons() -> None:
    found = info.collect()
    assert set(found["ops"]) == set(Op.registry)
    for name, devices in found["ops"].items():
        for dtype, row in devices["cpu"].items():
            assert set(row["backends"]) == set(Op.registry[name].rows)
            assert row["chosen"] in row["backends"] and row["why"], (name, dtype)
            assert not row["backends"][row["chosen"]]


def test_text_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for word in (fastlm.__version__, "torch", "threads", "layer_norm", "not cpu: dtype is float64", native.isa() or ""):
        assert word in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["fastlm"] == fastlm.__version__


def test_without_the_extension_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_extension", None)
        found = info.collect()
    row = found["ops"]["layer_norm"]["cpu"]["float32"]
    assert row["chosen"] == "reference" and "not built" in row["backends"]["cpu"][0]
    assert "not built" in info.render(found)


def test_a_forced_backend_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, fastlm.use_backend("cpu"):
        patch.setattr(native, "_extension", None)
        row = info.collect()["ops"]["layer_norm"]["cpu"]["float32"]
        assert row["chosen"] is None and "cannot run" in row["why"]
        assert "nothing" in info.render(info.collect())


def test_why() -> None:
    import torch

    op = Op.registry["layer_norm"]
    name, why = op.why(Request("cpu", torch.float64))
    assert name == "reference" and why.startswith("not cpu: dtype is float64")
    with fastlm.use_backend("reference"):
        assert op.why(Request("cpu", torch.float32)) == ("reference", "asked for")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastlm.info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "versions" in done.stdout


def test_cuda_launchers_kernels_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm.cuda import _binaries, _nvrtc

    manifest = {"launchers": "built", "nvcc": "13.0.88", "architectures": ["80", "90a"], "ptx": ["90"], "seconds": 9.4}
    monkeypatch.setattr(_binaries, "manifest", lambda: manifest)
    monkeypatch.setattr(_nvrtc, "find", lambda: (None, "NVRTC was not found"))
    found = info.collect()["cuda"]
    assert found["packaged"]["architectures"] == ["80", "90a"] and found["nvrtc"]["missing"] == "NVRTC was not found"
    text = info.render(info.collect())
    for part in ("for 80, 90a, 90 as PTX, by nvcc 13.0.88 (9 s)", "compiler   none: NVRTC was not found", "cache"):
        assert part in text
    monkeypatch.setattr(_binaries, "manifest", lambda: {"reason": "no nvcc in PATH", "launchers": "no compiler"})
    assert "none in the package: no nvcc in PATH" in info.render(info.collect())
    monkeypatch.setattr("fastlm.cuda._extension", None)
    text = info.render(info.collect())
    assert "unusable: fastlm._cuda is not built for this Python: no compiler" in text and "launchers  not built" in text


def test_malloc_and_workspace() -> None:
    code = (
        "import fastlm; from fastlm import info; print(info.collect()['malloc'])\n"
        "if fastlm.tune_malloc(): print(info.collect()['malloc'])"
    )
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert "not tuned in this process" in lines[0] or "cannot be tuned" in lines[0]
    assert all(line.startswith("tuned: fastlm.tune_malloc()") for line in lines[1:])
    assert "kept for the scratch" in info.render(info.collect())
