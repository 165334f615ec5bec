"""Every Triton kernel compiles for every chip, and what comes out keeps the rules, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.kernels import _platform

triton = pytest.importorskip("triton")
if _platform.INTERPRETED:
    pytest.skip("kernels loaded for the interpreter do not compile", allow_module_level=True)

from bench import binaries  # noqa: E402
from bench.ahead_of_time import Case, _gate, meta  # noqa: E402
from fastlm.kernels import _launch, gelu  # noqa: E402

tl = triton.language
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gate() -> dict[str, Any]:
    """What the gate says of every case, in a process of its own."""
    command = [sys.executable, "-m", "bench.ahead_of_time", "--json"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout, f"the gate ended with status {run.returncode}"
    return json.loads(run.stdout)


def test_no_kernel_breaks_a_rule(gate: dict[str, Any]) -> None:
    assert gate["rows"]
    assert not gate["complaints"], "\n".join(gate["complaints"])


def test_figures_are_the_committed_ones(gate: dict[str, Any]) -> None:
    if not gate["known"]:
        pytest.skip(f"no figures of Triton {gate['triton']} are committed; the rules held")
    hint = "\nlook at them, then: python -m bench.ahead_of_time --save"
    assert not gate["differences"], "\n".join(gate["differences"]) + hint


# --- the gate itself -------------------------------------------------------------------------------------------------


def row(chip: str = "sm_90", **demands: Any) -> _gate.Row:
    with _launch.recording(_gate.CHIPS[chip]) as launches:
        gelu.forward(meta(4096, 4096), False)
    return _gate.Row("gelu", Case("case", lambda: None, **demands), "_forward", chip, launches[0])


GOOD = {
    "registers": 128, "threads": 512, "shared": 1024, "local": 0, "spills": 0, "loads": {"16": 2}, "stores": {"16": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "demands", "said"),
    [
        ({}, {}, []),
        ({"spills": 1}, {}, ["1 spilling instructions, 0 allowed"]),
        ({"spills": 1}, {"spills": {"_forward": 1}}, []),
        ({"shared": 232449}, {}, ["232449 bytes of shared memory"]),
        ({"registers": 129}, {}, ["129 registers for 512 threads"]),
        ({}, {"wgmma": frozenset({"_forward"})}, ["no wgmma"]),
        ({"wgmma": 8}, {"wgmma": frozenset({"_forward"})}, []),
        ({"loads": {"16": 2, "8": 1, "2": 3}}, {}, ["narrower than 16 bytes: {'8 bytes': 1, '2 bytes': 3}"]),
        ({"loads": {"16": 2, "4": 1}}, {"narrow": {"_forward": 1}}, []),
        ({"loads": {"16": 2, "4": 1}}, {"narrow": {"_backward": 1}}, ["narrower"]),
        ({"loads": {"4": 1}, "stores": {"4": 1}}, {"narrow": 2}, ["no access of 16 bytes"]),
        ({"loads": {"4": 1}, "stores": {"4": 1}}, {"narrow": None}, []),
    ],
)
def test_what_breaks_a_rule(figures: dict, demands: dict, said: list[str]) -> None:
    found = _gate.complaints(row(**demands), GOOD | figures)
    assert len(found) == len(said)
    for text, part in zip(found, said, strict=True):
        assert part in text


def test_reads_a_disassembly() -> None:
    text = """
        /*0110*/              @!P0 LDG.E.128 R4, desc[UR4][R12.64] ;
        /*0120*/                   LDG.E.LTC128B.64.CONSTANT R4, [R20.64] ;
        /*0130*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0140*/              @P1  LDG.E.U16 R4, [R20.64] ;
        /*0150*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0160*/                   STL.64 [R1+0x8], R2 ;
        /*0170*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0180*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
    """
    assert binaries.read_sass(text) == {
        "spills": 1,
        "wgmma": 1,
        "tcgen05": 1,
        "loads": {"16": 2, "8": 1, "2": 1},
        "stores": {"4": 1},
    }


@triton.jit
def _spilling(x, y, N: tl.constexpr):
    """Every thread of one warp holds 512 values until their sum is known."""
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(y + at, value - tl.sum(value))


@triton.jit
def _broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.arange(0, N // 2))


def test_each_compilation_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spills is seen to, one that does not compile is reported, and the one beside it is unharmed."""
    monkeypatch.setattr(_gate, "CACHE", tmp_path)
    x = meta(4096, 4096, dtype=torch.float32)
    with _launch.recording(_gate.CHIPS["sm_90"]) as launches:
        _launch.launch(_spilling, (1,), x, x, N=16384, num_warps=1)
        _launch.launch(_broken, (1,), x, N=128)
        gelu.forward(x, False)
    case = Case("case", lambda: None)
    rows = [_gate.Row("gelu", case, launch.kernel.__name__, "sm_90", launch) for launch in launches]
    spilling, broken, good = (_gate.complaints(r, f) for r, f in zip(rows, _gate.compile_all(rows), strict=True))
    assert any("spilling" in what for what in spilling)
    assert len(broken) == 1 and broken[0].startswith("does not compile: CompilationError")
    assert good == []
    assert len(list(tmp_path.iterdir())) == 2, "an error is not kept, figures are"


def test_the_cache_depends_on_all_a_binary_depends_on() -> None:
    def recorded(**changes: Any) -> _launch.Launch:
        values = {"size": 1 << 20, "TANH": True, "BLOCK": 1024, "num_warps": 4} | changes
        with _launch.recording(_gate.CHIPS["sm_90"]) as launches:
            x = meta(16, dtype=values.pop("dtype", torch.float32))
            _launch.launch(gelu._forward, (1,), x, x[values.pop("offset", 0) :], values.pop("size"), **values)
        return launches[0]

    base = recorded()
    assert _gate.digest(base, "sm_90") == _gate.digest(recorded(), "sm_90") != _gate.digest(base, "sm_80")
    assert _gate.digest(base, "sm_90") == _gate.digest(recorded(size=1 << 21), "sm_90")
    for change in (
        {"dtype": torch.float16}, {"offset": 1}, {"size": 1}, {"size": 17}, {"size": 1 << 40}, {"TANH": False},
        {"BLOCK": 512}, {"num_warps": 8}, {"num_stages": 3},
    ):  # fmt: skip
        assert _gate.digest(recorded(**change), "sm_90") != _gate.digest(base, "sm_90"), change


def test_differences_name_what_changed() -> None:
    old = {"gelu": {"a: _forward": {"sm_80": GOOD, "sm_90": GOOD}, "b: _forward": {"sm_90": GOOD}}}
    new = {"gelu": {"a: _forward": {"sm_90": GOOD | {"registers": 99}}, "c: _forward": {"sm_90": GOOD}}}
    assert binaries.differences(old, new, _gate.DEFAULT) == [
        "gelu a: _forward on sm_90: registers 128 -> 99",
        "gelu b: _forward on sm_90: is in the table alone",
        "gelu c: _forward on sm_90: is not in the table",
    ]
    assert binaries.differences(old, old, _gate.DEFAULT) == []


def test_saving_replaces_what_was_compiled_alone(tmp_path: Path) -> None:
    table = binaries.Committed(tmp_path / "table.json")
    table.save("1", {"gelu": {"a": {"sm_80": GOOD, "sm_90": GOOD}}, "rope": {"a": {"sm_90": GOOD}}})
    table.save("2", {"gelu": {"a": {"sm_80": GOOD}}})
    assert '"sm_80 sm_90": {' in table.path.read_text(), "chips of equal figures share a line"
    table.save("1", {"gelu": {"b": {"sm_90": GOOD}}})
    saved = table.read()["1"]
    assert Counter({op: len(kernels) for op, kernels in saved.items()}) == {"gelu": 2, "rope": 1}
    assert set(saved["gelu"]["a"]) == {"sm_80"}, "what was compiled for sm_90 and is no longer there"
