"""What bench.gpu measured, as text, as tables of README and as drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.gpu import tables


def document() -> dict[str, Any]:
    row = {
        "stage": "ops", "name": "gelu 4x4 bfloat16", "op": "gelu", "shape": "4x4", "dtype": "bfloat16",
        "seconds": {"fastlm": 1e-3, "eager": 2e-3}, "host": {"fastlm": 2e-5}, "graph": {}, "errors": {},
        "bytes": 3e9, "flops": 0.0, "best_peer": "eager", "ratio": 2.0, "share": 0.75,
    }  # fmt: skip
    attention = row | {
        "stage": "attention", "name": "attention forward B1 H16 S16384 D128 bfloat16", "op": "attention forward",
        "shape": "B1 H16 S16384 D128", "flops": 5e11,
    }  # fmt: skip
    alone = row | {"name": "alone", "op": "alone", "seconds": {"fastlm": 1e-3}, "best_peer": "", "ratio": None}
    failed = row | {"name": "failed", "op": "failed", "seconds": {}}
    return {
        "about": {"device": "A GPU", "torch": "2.13.0", "triton": "3.9.0", "commit": "abc"},
        "ceilings": {"copy": 4e12, "product": {"bfloat16": 8e14, "float32": 4e14}},
        "rows": [row, attention, alone, failed],
        "failed": [{"stage": "ops", "name": "failed", "why": "ImportError: x"}],
        "dropped": [{"stage": "ops", "name": n, "why": "out of time"} for n in ("one", "two")],
        "tests": {"outcomes": {"passed": 3, "failed": 1}, "complete": True, "failures": [{"test": "t", "why": "w"}]},
    }


def test_the_summary_tells_everything() -> None:
    text = list(tables.summary(document()))
    assert "copy 4000 GB/s" in text[2] and "bfloat16 800" in text[2]
    (row,) = [line for line in text if line.startswith("gelu")]
    assert row.split()[3:] == ["1.000", "3000", "GB/s", "75%", "2.00x", "eager", "20"]
    assert any("500 TFLOP/s" in line for line in text)
    assert "  FAILED t" in text and "FAILED ops: failed: ImportError: x" in text
    assert text[-1] == "dropped (ops, out of time): one; two"


def test_the_faster_backend_is_named_for_each_size() -> None:
    def row(name: str, backend: str, **seconds: float) -> dict[str, Any]:
        return document()["rows"][0] | {"shape": name, "name": f"gelu {name}", "backend": backend, "seconds": seconds}

    rows = [
        row("8x8", "triton", fastlm=2e-3, eager=1e-3, cuda=1e-3),
        row("4x4", "triton", fastlm=1e-3, cuda=3e-3),
        row("2x2", "triton", fastlm=1e-3),
    ]
    data = document() | {"rows": rows}
    assert list(tables.versus(data)) == [
        ("gelu", "8x8", "bfloat16", "cuda 1.000, triton 2.000", "cuda", "2.00x"),
        ("gelu", "4x4", "bfloat16", "cuda 3.000, triton 1.000", "triton", "3.00x"),
    ]
    assert list(tables.wins(data)) == ["gelu: cuda fastest at 1 of 2, triton fastest at 1 of 2"]
    assert any(line.endswith("cuda by 2.00x") for line in tables.summary(data))
    assert "| gelu | 4x4 | bfloat16 | cuda 3.000, triton 1.000 | triton | 3.00× |" in list(tables.markdown(data))


def test_the_table_of_attention() -> None:
    data = document()
    (row,) = (r for r in data["rows"] if r["stage"] == "attention")
    row["seconds"] |= {"sdpa cudnn": 8e-4, "sdpa flash": 2e-3}
    data["rows"].append(row | {"op": "attention both causal", "seconds": {"fastlm": 1e-3, "sdpa cudnn": 2e-3}})
    heads, *lines = tables.sweep(data)
    assert lines == [
        ["forward", "128", "16384", "500", "250", "625", "250", "62%", "0.80×", "2.00×"],
        ["both causal", "128", "16384", "500", "", "250", "", "62%", "2.00×", ""],
    ]
    assert heads == ["attention", "D", "S", "fastlm", "eager", "sdpa cudnn", "sdpa flash", "of product", *tables.RIVALS]
    text = list(tables.markdown(data))
    assert "| forward | 128 | 16384 | 500 | 250 | 625 | 250 | 62% | 0.80× | 2.00× |" in text
    assert not any(line.startswith("| attention forward |") for line in text)
    assert list(tables.behind(data)) == [
        "attention: ahead of sdpa cudnn at 1 of 2 sizes; not at attention forward B1 H16 S16384 D128",
        "attention: ahead of sdpa flash at 1 of 1 sizes",
    ]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in tables.plot(document(), tmp_path)] == ["ops.svg", "attention.svg"]
    assert tables.plot(document() | {"rows": []}, tmp_path) == []


def test_readme_gets_a_table_for_each_device_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.render() == ""
    folder = tmp_path / "bench" / "results" / "a-gpu"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(document()))
    text = report.render()
    assert text.startswith("A GPU; torch 2.13.0")
    assert "| gelu | 4x4 | bfloat16 | 1.000 | 3000 GB/s | 75% | 2.00× | eager |" in text
