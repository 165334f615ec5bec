"""bench.gpu without a GPU: every stage's path, what an interrupt and a dying process leave, what time drops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import peers
from bench.gpu import __main__ as driver
from bench.gpu import checks, tables, worker
from bench.gpu.clock import CudaClock
from bench.gpu.items import Item, OfAmpere, attention_items, forced, op_items, train_items
from bench.gpu.record import Record
from bench.harness import Case, Clock, forward_backward
from fastlm import ops
from fastlm.cuda import attention as cuda_attention

ROOT = Path(__file__).resolve().parent.parent
DRY = ["--device", "cpu", "--small"]


def case(name: str, functions: dict[str, Any] | None = None, **changes: Any) -> Case:
    double = lambda x: x * 2  # noqa: E731
    fields = {"bytes": 1e6, "tolerance": 0.25} | changes
    made = functions or {"fastlm": double, "eager": double}
    return Case(name, "4x4", torch.float32, lambda: [torch.randn(4, 4).requires_grad_()], made, **fields)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "out")
    made.begin(["ops"])
    return made


def run_items(record: Record, cases: list[Case], seconds: float = 60.0) -> dict[str, Any]:
    items = [Item(c, False) for c in cases]
    worker.run_items("ops", items, record, Clock(), time.time() + seconds, 0.001)
    return Record(record.path.parent).data


# --- measuring -------------------------------------------------------------------------------------------------------


def test_a_row_holds_what_was_measured(record: Record) -> None:
    record.set("ceilings", {"copy": 1e9, "product": {"float32": 1e12}})
    data = run_items(record, [case("one", flops=1e6)])
    (row,) = data["rows"]
    assert row["name"] == "one 4x4 float32" and row["errors"] == {} and set(row["seconds"]) == {"fastlm", "eager"}
    assert row["best_peer"] == "eager"
    assert row["ratio"] == pytest.approx(row["seconds"]["eager"] / row["seconds"]["fastlm"])
    assert row["share"] == pytest.approx((1e6 / 1e9 + 1e6 / 1e12) / row["seconds"]["fastlm"])
    assert not data["failed"] and not data["dropped"] and data["running"] is None


def test_a_peer_that_fails_costs_its_own_time_alone(record: Record) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ImportError("no such thing")

    data = run_items(record, [case("one", {"fastlm": torch.neg, "liger": broken, "eager": torch.neg})])
    assert set(data["rows"][0]["seconds"]) == {"fastlm", "eager"}
    assert data["rows"][0]["errors"] == {"liger": "ImportError: no such thing"}
    assert not data["failed"]


def test_a_wrong_or_broken_result_is_not_timed(record: Record) -> None:
    wrong = case("wrong", {"fastlm": lambda x: x * 3, "eager": lambda x: x * 2})
    broken = case("broken", {"fastlm": lambda x: x.nothing, "eager": lambda x: x})
    data = run_items(record, [wrong, broken, case("right")])
    assert [row["seconds"] for row in data["rows"][:2]] == [{}, {}] and data["rows"][2]["seconds"]
    assert [note["name"] for note in data["failed"]] == ["wrong 4x4 float32", "broken 4x4 float32"]
    assert "differs from eager" in data["failed"][0]["why"]


def test_each_backend_of_ours_is_timed_and_judged_beside_the_chosen_one(record: Record) -> None:
    twice, thrice = (lambda x: x * 2), (lambda x: x * 3)
    good = case("good", {"fastlm": twice, "eager": twice, "triton": twice, "cuda": twice})
    bad = case("bad", {"fastlm": twice, "eager": twice, "cuda": thrice})
    data = run_items(record, [good, bad])
    first, second = data["rows"]
    assert set(first["seconds"]) == {"fastlm", "eager", "triton", "cuda"} and first["best_peer"] == "eager"
    assert set(second["seconds"]) == {"fastlm", "eager"} and "differs from eager" in second["errors"]["cuda"]
    assert [(note["name"], note["why"][:6]) for note in data["failed"]] == [("bad 4x4 float32", "cuda: ")]


def test_what_is_chosen_is_named_and_not_timed_twice(record: Record) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(x)

    functions = {"fastlm": function, "eager": torch.nn.functional.gelu}
    functions |= {name: forced(name, function) for name in ("cpu", "reference")}
    (row,) = run_items(record, [case("gelu", functions)])["rows"]
    assert row["backend"] in ("cpu", "reference")
    assert set(row["seconds"]) == {"fastlm", "eager", "cpu", "reference"} - {row["backend"]}


def test_a_backend_is_forced_also_where_a_step_is_returned() -> None:
    seen: list[str] = []

    def look(*_: Any) -> Any:
        with worker.choices() as chosen:
            ops.gelu(torch.ones(1))
        seen.extend(chosen)
        return look if len(seen) < 2 else torch.ones(1)

    forced("reference", look)()()
    assert seen == ["reference"] * 2


def test_every_op_is_timed_on_the_backends_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.items.ours", lambda: ["triton", "cuda"])
    timed = {item.case.op: item.case.functions for item in op_items(small=True)}
    assert {"triton", "cuda"} <= set(timed["gelu"]) and "triton" in timed["layer_norm"]
    assert "cuda" not in timed["linear_cross_entropy"], "an op without the row is left alone"


def test_time_drops_what_comes_last(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(worker.time, "time", lambda: now[0])

    def slow(x: torch.Tensor) -> torch.Tensor:
        now[0] += 1.0
        return x * 2

    data = run_items(record, [case(str(i), {"fastlm": slow, "eager": torch.add}, tolerance=None) for i in range(4)], 20)
    names = [row["name"].split()[0] for row in data["rows"]]
    dropped = [note["name"].split()[0] for note in data["dropped"]]
    assert names and dropped and names + dropped == ["0", "1", "2", "3"]


def test_what_was_tried_is_not_tried_again(record: Record) -> None:
    run_items(record, [case("one")])
    before = record.data["rows"][0]["seconds"]
    data = run_items(record, [case("one"), case("two")])
    assert data["rows"][0]["seconds"] == before and len(data["rows"]) == 2
    again = Record(record.path.parent)
    again.begin(["ops"])
    data = run_items(again, [case("one")])
    assert [row["name"] for row in data["rows"]] == ["two 4x4 float32", "one 4x4 float32"], "a new invocation measures"


class Cuda:
    """What CudaClock uses of torch.cuda. Time passes by one second a run."""

    def __init__(self, captures: bool) -> None:
        self.captures, self.seconds, self.replays, self.capturing = captures, 0.0, 0, False
        self.streams: list[Any] = []
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.seconds

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                cuda.replays += 1
                cuda.seconds += 1

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self) -> Any:
        return SimpleNamespace()

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(L2_cache_size=1 << 10)

    def synchronize(self) -> None:
        pass

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.streams.append(stream)
        yield
        self.streams.pop()

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        yield
        self.capturing = False


@pytest.mark.parametrize("captures", [True, False])
def test_the_clock_of_a_gpu(captures: bool, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaClock, "device", "cpu")
    cuda = Cuda(captures)
    clock = CudaClock(cuda)

    first: list[Any] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        first.append(list(cuda.streams))
        cuda.seconds += 0 if cuda.capturing else 3
        return x * 2

    item = Item(case("one", {"fastlm": step, "eager": step}), False)
    worker.run_items("ops", [item], record, clock, time.time() + 60, 0.001)
    (row,) = record.data["rows"]
    assert row["seconds"] == ({"fastlm": 1.0, "eager": 1.0} if captures else {"fastlm": 3.0, "eager": 3.0})
    assert first[0] == [clock.stream], "a backward runs where its forward ran: on the stream that is captured"
    assert row["graph"] == {"fastlm": captures, "eager": captures}
    assert set(row["host"]) == {"fastlm", "eager"} and (cuda.replays > 0) == captures
    assert ("no graph: fastlm, eager" in "\n".join(tables.summary(record.data))) == (not captures)


# --- the tables of cases ---------------------------------------------------------------------------------------------


def test_items_have_names_of_their_own_and_the_important_come_first() -> None:
    items = op_items()
    for some in (items, op_items(small=True), attention_items(), train_items()):
        assert len({item.name for item in some}) == len(some)
    assert {item.case.op for item in items if item.compiled} >= {"layer_norm", "cross_entropy", "rope"}
    first = items[: len({item.case.op for item in items if item.compiled})]
    assert all(item.case.dtype is torch.bfloat16 for item in first)
    wide = [i for i, item in enumerate(items) if item.case.dtype is torch.float32]
    assert min(wide) > len(first)


def test_the_sweep_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.items.ours", lambda: ["triton"])
    cases = [item.case for item in attention_items()]
    assert {case.shape.split()[2] for case in cases} == {f"S{512 << n}" for n in range(6)}
    assert {case.shape.split()[3] for case in cases} == {"D64", "D128", "D256"}
    assert all({"fastlm", "triton", "sdpa flash", "sdpa cudnn"} <= set(case.functions) for case in cases)
    by = {case.name: case.flops for case in cases}
    full = 4 * 16 * 16384**2 * 128
    assert by["attention forward B1 H16 S16384 D128 bfloat16"] == full
    assert by["attention backward causal B1 H16 S16384 D128 bfloat16"] == 2.5 * full / 2
    assert by["attention both causal B1 H16 S16384 D128 bfloat16"] == 3.5 * full / 2
    assert len(by) == 6 * 3 * 2 * 3 and all("both" in name for name in list(by)[72:])


def test_the_kernels_of_sm_80_are_timed_beside_those_of_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward, and nothing else is."""
    monkeypatch.setattr("bench.gpu.items.ours", lambda: ["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    seen: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(cuda_attention.HOPPER)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(cuda_attention.HOPPER)
            return grad

    (item, *_) = [i for i in attention_items(small=True) if i.name.startswith("attention both")]
    assert {"cuda", "cuda sm_80"} <= set(item.case.functions)
    for function, path in ((Look.apply, True), (OfAmpere(Look.apply), False)):
        seen.clear()
        item.case.runner(function, [torch.ones(2, requires_grad=True)])()
        assert seen == [path, path] and cuda_attention.HOPPER


def test_flash_attention_of_either_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name.startswith("flash_attn") or None)
    found, q = peers.peers("attention causal"), torch.randn(1, 2, 3, 4)
    assert list(found) == ["flash_attn", "flash_attn 3"]

    def add(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        assert causal and q.shape == (1, 3, 2, 4)
        return q + k + v

    for name, function in (("flash_attn", add), ("flash_attn_interface", lambda *t, causal: (add(*t, causal), None))):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=function))  # type: ignore[arg-type]
    for provider in found.values():
        assert torch.equal(provider(q, q, q), q + q + q)


def test_peers_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peers.peers("layer_norm") == {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel" or None)
    found = peers.peers("layer_norm")
    assert list(found) == ["liger"]
    module = SimpleNamespace(liger_layer_norm=lambda *args: args)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())  # type: ignore[arg-type]
    package = SimpleNamespace(functional=module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)  # type: ignore[arg-type]
    assert found["liger"]("x", "w", "b") == ("x", "w", "b", 1e-5)


# --- the driver ------------------------------------------------------------------------------------------------------

DIES = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from bench.gpu.record import Record
record = Record(Path(sys.argv[sys.argv.index("--out") + 1]))
for name in "ABC":
    if name not in record.done("ops"):
        record.start("ops", name)
        if name == "B":
            {death}
        record.add({{"stage": "ops", "name": name}})
        record.finish()
"""


@pytest.mark.parametrize(
    ("death", "rows", "why"),
    [
        ("os.abort()", ["A", "C"], "status -6"),
        ("time.sleep(600)", ["A"], "did not end"),
        ("sys.exit(3)", ["A", "C"], "3"),
    ],
)
def test_an_item_that_kills_the_process_costs_itself_alone(
    death: str, rows: list[str], why: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(DIES.format(python=sys.executable, root=str(ROOT), death=death))
    script.chmod(0o755)
    monkeypatch.setattr(driver.sys, "executable", str(script))
    monkeypatch.setattr(driver, "GRACE", 8.0 if "sleep" in death else 600.0)
    data = driver.measure(record, "ops", "cpu", time.time(), True).data
    assert [row["name"] for row in data["rows"]] == rows
    (failed,) = data["failed"]
    assert failed["name"] == "B" and why in failed["why"] and data["running"] is None


def test_the_command(tmp_path: Path) -> None:
    """A dry run from end to end, then one more stage into the same folder."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), *DRY]
    run = subprocess.run([*command, "--stage", "train"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["about"]["torch"] == torch.__version__ and data["ceilings"]["copy"] > 0
    assert [row["stage"] for row in data["rows"]] == ["train"]
    assert "train gpt2 tiny" in run.stdout.splitlines()[-2] and run.stdout.splitlines()[-1].startswith("written: ")
    run = subprocess.run([*command, "--stage", "test", "--minutes", "5"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["tests"]["complete"] and set(data["tests"]["outcomes"]) == {"passed"}
    assert [row["stage"] for row in data["rows"]] == ["train"], "what was measured before is kept"


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--stage", "ops", *DRY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    results = tmp_path / "results.json"

    def rows() -> list[Any]:  # whole at any moment
        return json.loads(results.read_text())["rows"] if results.exists() else []

    while process.poll() is None and len(rows()) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    assert len(rows()) >= 2 and "written: " in out.splitlines()[-1] and rows()[0]["name"] in out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("results.") and path != results]


def test_a_stage_gets_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def measure(record: Record, stage: str, device: str, until: float, small: bool) -> Record:
        given.append((stage, until - time.time()))
        return record

    monkeypatch.setattr(driver, "measure", measure)
    driver.run(["ops", "attention", "train"], tmp_path, 9, "cpu", True)
    assert [stage for stage, _ in given] == ["ops", "attention", "train"]
    assert [seconds for _, seconds in given] == pytest.approx([540 * 8 / 18, 540 * 6 / 10, 540], rel=0.02)


# --- build, test, sanitize -------------------------------------------------------------------------------------------


def test_failures_of_the_tests_are_in_the_summary_also_when_cut_short(tmp_path: Path) -> None:
    lines, file = tmp_path / "lines", tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\ndef test_last(): os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.pytest_lines", "--lines", str(lines), str(file)]
    subprocess.run([*command, "-c", os.devnull], cwd=ROOT, capture_output=True)
    found = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [r["outcome"] for r in found] == ["passed", "failed", "skipped"]
    assert "assert 1 == 2" in found[1]["why"]


def test_sanitize_says_when_the_tool_is_absent(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "sanitizer", lambda: None)
    checks.sanitize(record, "cpu", time.time() + 5)
    assert "not installed" in "\n".join(tables.summary(Record(record.path.parent).data))


def test_hazards_of_the_copy_engine_are_explained(record: Record) -> None:
    hazard = "========= Error: Race reported between Write access at 0x{:x} in {}+0x40 and Read access at 0x80\n"
    text = "".join(hazard.format(n, k) for n, k in enumerate(["attention_hopper_forward_0"] * 2 + ["adam_1"]))
    found = checks.read_log(text + "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n")
    assert found["errors"] == 3
    (said,) = found["explained"]
    assert said.startswith("2 of its hazards are in attention_hopper_forward_0: ")
    record.set("sanitize", {"cuda racecheck": found})
    assert f"  cuda racecheck: {said}" in list(tables.summary(record.data))


def test_sanitize_reads_what_the_tool_says(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "========= COMPUTE-SANITIZER"\necho "gelu 1x3"\n'
        'if [ "$2" = racecheck ]; then sleep 600; fi\n'
        'echo "========= Invalid __global__ read of size 4 bytes"\necho "========= ERROR SUMMARY: 1 error"\nexit 99\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "sanitizer", lambda: str(tool))
    checks.sanitize(record, "cpu", time.time() + 4)
    found = Record(record.path.parent).data["sanitize"]
    assert found["memcheck"]["errors"] == 1 and found["memcheck"]["ran"] == 1
    assert "Invalid __global__ read" in found["memcheck"]["said"]
    assert found["racecheck"]["ended"] == "out of time" and found["racecheck"]["errors"] is None
    assert "memcheck: 1 errors" in "\n".join(tables.summary(record.data))


def test_every_backend_is_sanitized(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "ran"\necho "========= ERROR SUMMARY: 0 errors"\necho "$@" >>"$0.called"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "sanitizer", lambda: str(tool))
    record.set("about", {"backends": ["triton", "cuda"]})
    checks.sanitize(record, "cpu", time.time() + 60)
    called = [line.split() for line in Path(f"{tool}.called").read_text().splitlines()]
    passes = [f"{words[-1]} {words[1]}" for words in called]
    assert passes == [
        "triton memcheck", "triton racecheck", "cuda memcheck", "cuda racecheck", "cuda synccheck", "cuda initcheck",
    ]  # fmt: skip
    assert list(Record(record.path.parent).data["sanitize"]) == passes


def test_the_build_is_for_the_gpu_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.architecture() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 8.9\necho 9.0\n")
    tool.chmod(0o755)
    assert checks.architecture() == "89 90a"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert checks.architecture() is None


def test_every_op_runs_on_odd_sizes() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu.odd", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    ran = run.stdout.splitlines()
    for op in ("adam", "attention backward", "attention documents", "cross_entropy", "rope", "add_layer_norm"):
        assert any(text.startswith(op) for text in ran), op


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_tuning_leaves_out_what_spills_and_finds_the_fastest(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from fastlm.kernels import _platform

    if _platform.INTERPRETED:
        pytest.skip("kernels loaded for the interpreter do not compile")
    from bench.ahead_of_time import _gate, meta
    from bench.gpu import tune
    from fastlm.kernels import _launch
    from tests.test_ahead_of_time import _spilling

    assert triton
    x = meta(1 << 16, dtype=torch.float32)
    small, large = tune.Config(32, 32, 4, 2), tune.Config(128, 128, 4, 2)

    def run() -> None:
        config = tune.table.OVERRIDES["forward"]
        _launch.launch(_spilling, (1,), x, x, N=config.m * config.n, num_warps=1)

    monkeypatch.setattr(_gate, "CACHE", record.path.parent)
    chip = _gate.CHIPS["sm_90"]
    assert tune.sift(run, "forward", [small, large], chip) == [small]
    assert tune.sift(run, "forward", [large], chip) == [large], "all spill: the least evil is still to be found"
    assert tune.table.OVERRIDES == {}

    fast, _ = tune.candidates(small=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002 if tune.table.OVERRIDES.get("forward") == fast else 0.02)
        return q + k + v

    slow = Case("a", "s", torch.float32, lambda: [torch.ones(2, requires_grad=True)] * 3, {"fastlm": attend})
    found = tune.sweep(slow, "forward", Clock(), time.time() + 60, True)
    assert found["best"] == str(tuple(fast)) and found["gain"] > 2 and slow.runner is forward_backward


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "PyTorch sees no GPU" in run.stderr
