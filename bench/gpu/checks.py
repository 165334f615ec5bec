"""The stages that measure nothing: build, test, sanitize."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from bench.gpu.record import ROOT, Record, about

TAIL = 4000
"""Characters of a failed command's output that are kept."""


def build(record: Record, device: str) -> None:
    """Builds the C++ extension where it is missing or older than a source, and notes what is installed."""
    built = sorted((ROOT / "fastlm").glob("_C*.so"))
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    done = "up to date"
    if not built or max(p.stat().st_mtime for p in sources) > min(p.stat().st_mtime for p in built):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
        start = time.time()
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        done = f"built in {time.time() - start:.0f} s"
        if run.returncode:
            done = "failed: " + (run.stdout + run.stderr)[-TAIL:]
            record.note("failed", "build", "extension", done)
    # In a process of its own: this one never opens the GPU, which would take memory from those that measure.
    code = f"import json; from bench.gpu.record import about; print(json.dumps(about({device!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        record.note("failed", "build", "versions", run.stderr.strip().splitlines()[-1])
    else:
        record.set("about", json.loads(run.stdout.splitlines()[-1]) | {"extension": done})
    print(f"build: extension {done.splitlines()[0]}; {record.data['about'] or about('cpu')}", flush=True)


def test(record: Record, until: float, small: bool) -> None:
    """pytest of what runs on the GPU; several processes where pytest-xdist is there: compilation takes longest."""
    lines = record.path.with_name("tests.jsonl")
    lines.unlink(missing_ok=True)
    chosen = ["tests/ops/test_gelu.py", "-k", "bad_arguments"] if small else ["tests", "-k", "triton or cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += ["-p", "bench.gpu.pytest_lines"]
    if importlib.util.find_spec("xdist") and not small:
        command += ["-n", str(min(8, max((os.cpu_count() or 1) // 2, 1)))]
    command += ["--lines", str(lines), *chosen]
    complete, log = True, record.path.with_name("tests.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(until - time.time(), 1))
        except subprocess.TimeoutExpired:
            complete = False
            record.note("dropped", "test", "the rest of the tests", "out of time")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found = [json.loads(text) for text in lines.read_text().splitlines()] if lines.exists() else []
    summary: dict[str, Any] = {
        "command": " ".join(["python", *command[1:]]),
        "complete": complete and process.returncode in (0, 1),
        "outcomes": dict(Counter(r["outcome"] for r in found)),
        "failures": [{"test": r["test"], "why": r["why"]} for r in found if r["outcome"] == "failed"],
        "slowest": sorted(({"test": r["test"], "seconds": r["seconds"]} for r in found), key=lambda r: -r["seconds"])[
            :5
        ],
    }
    if process.returncode not in (0, 1) and complete:
        record.note("failed", "test", "pytest", f"status {process.returncode}: {log.read_text()[-TAIL:]}")
    record.set("tests", summary)
    print(f"test: {summary['outcomes']}{'' if summary['complete'] else ', incomplete'}", flush=True)
    for failure in summary["failures"][:10]:
        print(f"  FAILED {failure['test']}", flush=True)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitize(record: Record, device: str, until: float) -> None:
    """memcheck and racecheck over every op on odd sizes (bench/gpu/odd.py)."""
    found: dict[str, Any] = {}
    tool = sanitizer()
    if tool is None:
        record.set("sanitize", {"missing": "compute-sanitizer is not installed: memory accesses and races unchecked"})
        print(f"sanitize: {record.data['sanitize']['missing']}", flush=True)
        return
    kinds = ("memcheck", "racecheck")
    for position, kind in enumerate(kinds):
        command = [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "20", sys.executable]
        command += ["-m", "bench.gpu.odd", "--device", device]
        # Each tensor an allocation of its own: within torch's cache an access past the end would go unseen.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        share = max((until - time.time()) / (len(kinds) - position), 1)
        log = record.path.with_name(f"{kind}.log")
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                status = f"status {process.wait(share)}"
            except subprocess.TimeoutExpired:
                status = "out of time"
                record.note("dropped", "sanitize", f"the rest of {kind}", "out of time")
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        found[kind] = read_log(log.read_text()) | {"ended": status}
        record.set("sanitize", found)
        errors = found[kind]["errors"]
        print(f"sanitize: {kind}: {status}, {'no summary' if errors is None else f'{errors} errors'}", flush=True)


def read_log(text: str) -> dict[str, Any]:
    """The tool's own count, the ops that ran, what it said first."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    said = [line for line in text.splitlines() if line.startswith("=========")]
    ran = [line for line in text.splitlines() if line and not line.startswith(("=", " "))]
    return {
        "errors": int(summary[1]) if summary else None,
        "ran": len(ran),
        "failed": [line.strip() for line in text.splitlines() if line.startswith("  FAILED")],
        "said": "\n".join(said)[:TAIL],
    }
