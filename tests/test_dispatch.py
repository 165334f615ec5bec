"""The choice of a backend: forced, automatic, warned about, strict."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fastlm
from fastlm import _dispatch
from fastlm._dispatch import LOW_PRECISION, Backend, Op, Request

REFERENCE = Backend("reference", "fastlm.reference.layer_norm")


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    monkeypatch.setattr(Op, "registry", {})
    cpu = Backend("cpu", "fastlm.native.layer_norm", frozenset({"cpu"}), LOW_PRECISION, {"head_dim": 256})
    return Op("thing", cpu, REFERENCE)


def test_reasons_name_everything_that_is_wrong(op: Op) -> None:
    request = Request("meta", torch.float64, (("head_dim", 300),))
    reasons = op.explain(request)
    assert reasons["reference"] == []
    assert len(reasons["cpu"]) == 3
    assert "head_dim is 300, above the limit 256" in reasons["cpu"]


def test_the_first_row_that_can_is_taken(op: Op) -> None:
    with fastlm.use_backend(None):
        assert op.select(torch.ones(1)) == "cpu"
        assert op.select(torch.ones(1).double()) == "reference"  # expected, so without a warning


def test_a_fall_to_the_reference_warns_once(op: Op) -> None:
    with pytest.warns(UserWarning, match="head_dim is 300"):
        assert op.select(torch.ones(1), head_dim=300) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.select(torch.ones(1), head_dim=300)


def test_strict_raises_instead(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_strict", True)
    with pytest.raises(fastlm.UnsupportedError, match="FASTLM_STRICT"):
        op.select(torch.ones(1), head_dim=300)


def test_a_forced_backend_never_falls_back(op: Op) -> None:
    with pytest.raises(fastlm.UnsupportedError, match="float64"):
        op.select(torch.ones(1).double(), "cpu")
    with fastlm.use_backend("cpu"), pytest.raises(fastlm.UnsupportedError, match="head_dim"):
        op.select(torch.ones(1), head_dim=300)
    with pytest.raises(fastlm.UnsupportedError, match="has no backend 'triton', only cpu, reference"):
        op.select(torch.ones(1), "triton")


def test_an_unknown_name_lists_the_legal_ones(op: Op) -> None:
    with pytest.raises(ValueError, match="must be one of cuda, triton, cpu, reference, got 'gpu'"):
        op.select(torch.ones(1), "gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), fastlm.use_backend("gpu"):
        pass


def test_argument_beats_context_and_contexts_nest(op: Op) -> None:
    with fastlm.use_backend("cpu"):
        assert op.select(torch.ones(1), "reference") == "reference"
        with fastlm.use_backend("reference"):
            assert op.select(torch.ones(1)) == "reference"
        assert op.select(torch.ones(1)) == "cpu"


def test_a_missing_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "registry", {})
    absent = Backend("cpu", "nowhere", frozenset({"cpu"}), LOW_PRECISION, missing=lambda: "it was not built")
    op = Op("thing", absent, REFERENCE)
    with pytest.warns(UserWarning, match="it was not built"):
        assert op.select(torch.ones(1)) == "reference"


def test_without_the_extension_everything_runs_on_the_reference() -> None:
    code = """
import sys, warnings
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "fastlm._C":
            raise ModuleNotFoundError("gone", name=name)
sys.meta_path.insert(0, Gone())
import torch, fastlm
assert fastlm.native.missing() and fastlm.native.isas() == []
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x = torch.randn(3, 8, requires_grad=True)
    fastlm.ops.layer_norm(x).sum().backward()
    fastlm.ops.layer_norm(x)
assert len(seen) == 1 and "C++17 compiler" in str(seen[0].message), seen
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_broken_extension_raises() -> None:
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "fastlm._C":
            raise ImportError("libgomp.so.1: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import fastlm
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "libgomp" in run.stderr


def test_features_are_declared(op: Op) -> None:
    with pytest.raises(fastlm.UnsupportedError, match=r"with dropout, window.*it has no dropout and no window"):
        op.select(torch.ones(1), "cpu", frozenset({"window", "dropout"}))
    with pytest.warns(UserWarning, match="it has no window"):
        assert op.select(torch.ones(1), features=frozenset({"window"})) == "reference"


def test_a_device_no_backend_serves_belongs_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "registry", {})
    gpu_only = Op(
        "thing", Backend("triton", "fastlm.kernels.layer_norm", frozenset({"cuda"}), LOW_PRECISION), REFERENCE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu_only.select(torch.ones(1)) == "reference"
