"""python -m bench cpu: what is promised, what is kept of a run, and how it is shown. Nothing is timed for its time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_cross_entropy
from bench.cpu import results, run, tables
from bench.cpu.items import Item, Target, items, select
from bench.cpu.results import Results
from bench.harness import Clock, afresh, agree

ROOT = Path(__file__).resolve().parent.parent
ITEM = Item("gelu", "8x8", "float32", "op", (Target("eager", "tuned", 2.0), Target("compile", "tuned", 1.5)))


def test_items_have_names_of_their_own_and_suites_with_tests() -> None:
    found = items()
    assert len({item.key for item in found}) == len(found)
    for item in found:
        assert item.kind != "op" or list((ROOT / "tests" / "ops").glob(f"test_{item.suite}.py")), item.name
        for target in item.targets:
            assert item.case is None or target.peer in item.case.functions, item.name


def test_items_are_found_by_words() -> None:
    assert {item.op for item in select(["rms_norm 8192"])} == {"rms_norm", "add_rms_norm"}
    assert [item.name for item in select([])] == [item.name for item in items()]
    with pytest.raises(ValueError, match="nothing is called 'rms_nrom'"):
        select(["rms_nrom"])


def test_logits_overwritten_in_place_are_filled_anew() -> None:
    (case, *_) = bench_cross_entropy.in_place_cases([(5, 67)])
    runs = case.build("fastlm", "eager")
    agree(case, runs)
    mine = runs["fastlm"]
    first, second = (Clock().prepare(mine), afresh(mine))
    once, again = first(), second()  # destroyed by the first, so that its loss is another
    assert once[0] != again[0] and torch.equal(afresh(mine)()[0], once[0])


def document(path: Path | None = None) -> Results:
    record = Results(path)
    record.data["ceilings"] = {"tuned": {"bandwidth": 3e10, "product": {"float32": 3e11}}}
    seconds = {"fastlm": 0.01, "eager": 0.03, "compile": 0.012}
    record.add(ITEM, {"tuned": {"values": seconds, "bytes": 1.5e8, "flops": 0.0}})
    return record


def test_a_row_is_on_disk_at_once_and_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    document(path)
    again = Results(path)
    assert again.has(ITEM, "tuned") and not again.has(ITEM, "default")
    assert not again.has(select(["swiglu"])[0], "tuned")
    again.about["commit"] = "another"
    assert not again.has(ITEM, "tuned")
    again.add(ITEM, {"default": {"values": {"fastlm": 0.02, "eager": 0.03}}})
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["runs"]) == {"default", "tuned"} and row["runs"]["tuned"]["commit"] != "another"


def test_ratios_and_promises() -> None:
    record = document()
    row = record.row(ITEM)
    assert results.ratio(row, ["eager"], "tuned") == pytest.approx(3)
    assert results.ratio(row, ["eager"], "default") is None
    assert [results.holds(row, target)[1] for target in ITEM.targets] == [True, False]
    assert tables.promises(ITEM, row) == "PyTorch ≥ 2 ✓; compile ≥ 1.5 ✗"
    text = run.line(record.data, row, ITEM, "tuned")
    assert "eager 3.00x (>= 2: holds)" in text and "compile 1.20x (>= 1.5: MISSED)" in text and "50%" in text
    assert "promised 1.5x" in run.missing([ITEM], document())


def test_a_step_of_fastlm_is_held_against_both_mallocs() -> None:
    step = {
        "kind": "step",
        "runs": {"default": {"values": {"plain": 6.0}}, "tuned": {"values": {"fastlm": 2.0, "plain": 3.0}}},
    }
    assert results.ratio(step, ["plain"], "default") == 3 and results.ratio(step, ["plain"], "tuned") == 1.5


def test_table_and_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tables, "items", lambda: [ITEM])
    record = document()
    text = "\n".join(tables.markdown(record.data))
    assert (
        "| gelu | 8x8 | float32 | 10.00 ms | 3.00× | 1.20× |  | PyTorch ≥ 2 ✓; compile ≥ 1.5 ✗ | 50% bandwidth |"
        in text
    )
    assert tables.plot(record.data, tmp_path / "a.svg") and tables.plot(record.data, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()


def test_a_worker_times_what_it_is_told_and_a_failure_costs_its_row_only() -> None:
    small = next(item for item in items() if item.op == "rms_norm" and not item.targets)
    command = [sys.executable, "-m", "bench.cpu.worker", "default", "no such item", small.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ceilings, failed, row, again = (json.loads(text) for text in done.stdout.splitlines())
    assert again["bandwidth"] >= ceilings["bandwidth"] > 0 and "KeyError" in failed["error"]
    assert row["name"] == small.name and set(row["values"]) == {"fastlm", "eager"}


def test_the_process_ends_with_its_reader() -> None:
    endless = [sys.executable, "-c", "import time; print('{\"a\": 1}', flush=True); time.sleep(600)"]
    found: Any = run.answers(endless)
    assert next(found) == {"a": 1}
    found.close()
