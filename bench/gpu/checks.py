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

ELSEWHERE = ("--ignore=tests/test_ahead_of_time.py", "--ignore=tests/test_cuda_binaries.py")
"""Tests that take minutes and need no GPU."""
TAIL = 4000
"""Characters of a failed command's output that are kept."""


def build(record: Record, device: str) -> None:
    """Builds the C++ extensions where they are missing or older than a source, and notes what is installed. A dry run
    takes what is there."""
    names = ("_C*.so", "_cuda*.so") if device == "cuda" else ("_C*.so",)
    built = [path for name in names for path in (ROOT / "fastlm").glob(name)]
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()] if device == "cuda" else []
    newest = max((path.stat().st_mtime for path in sources), default=0)
    done = "up to date"
    environment = dict(os.environ)
    if arch := architecture():
        environment.setdefault("FASTLM_CUDA_ARCHS", arch)  # the others would take minutes and never run
    if len(built) < len(names) or newest > min(path.stat().st_mtime for path in built):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
        start = time.time()
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
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
    manifest = ROOT / "fastlm" / "cuda" / "binaries" / "manifest.json"
    if manifest.is_file():
        told = json.loads(manifest.read_text())
        made = {name: told.get(name) for name in ("architectures", "nvcc", "seconds", "reason")}
        record.set("about", record.data["about"] | {"cuda binaries": made})
    print(f"build: extension {done.splitlines()[0]}; {record.data['about'] or about('cpu')}", flush=True)


def architecture() -> str | None:
    """FASTLM_CUDA_ARCHS for the GPU at hand, by its driver's tool: this process never opens the GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    found = sorted({line.strip().replace(".", "") for line in run.stdout.splitlines() if re.match(r"\d+\.\d", line)})
    return " ".join("90a" if arch == "90" else arch for arch in found) or None


def test(record: Record, until: float, small: bool) -> None:
    """pytest of what runs on the GPU; several processes where pytest-xdist is there: compilation takes longest."""
    lines = record.path.with_name("tests.jsonl")
    lines.unlink(missing_ok=True)
    chosen = ["tests", "-k", "triton or cuda", *ELSEWHERE]
    if small:
        chosen = ["tests/ops/test_gelu.py", "-k", "bad_arguments"]
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


KINDS = {
    "": ("memcheck", "racecheck"),
    "triton": ("memcheck", "racecheck"),
    "cuda": ("memcheck", "racecheck", "synccheck", "initcheck"),
}
"""Passes by backend; "" is the one that is chosen. initcheck sees what is read before it is written, by any kernel."""


COPIES = "attention_hopper"
"""Kernels whose copies racecheck cannot follow."""
EXPLAINED = (
    "{count} of its hazards are in {kernel}: the tool does not know that whoever has waited for a barrier that counts "
    "bytes comes behind the copy engine's writes, nor that the wait for a bulk group comes behind its reads. "
    "tests/cuda/test_attention_pipeline.py goes through every order of what these kernels do"
)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitize(record: Record, device: str, until: float) -> None:
    """compute-sanitizer's tools over every op on odd sizes (bench/gpu/odd.py)."""
    found: dict[str, Any] = {}
    tool = sanitizer()
    if tool is None:
        record.set("sanitize", {"missing": "compute-sanitizer is not installed: memory accesses and races unchecked"})
        print(f"sanitize: {record.data['sanitize']['missing']}", flush=True)
        return
    backends = record.data["about"].get("backends") or [""]
    passes = [(f"{backend} {kind}".strip(), kind, backend) for backend in backends for kind in KINDS[backend]]
    for position, (name, kind, backend) in enumerate(passes):
        command = [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "20", sys.executable]
        command += ["-m", "bench.gpu.odd", "--device", device, *(["--backend", backend] if backend else [])]
        # Each tensor an allocation of its own: within torch's cache an access past the end would go unseen.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        share = max((until - time.time()) / (len(passes) - position), 1)
        log = record.path.with_name(f"{name.replace(' ', '-')}.log")
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                status = f"status {process.wait(share)}"
            except subprocess.TimeoutExpired:
                status = "out of time"
                record.note("dropped", "sanitize", f"the rest of {name}", "out of time")
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        found[name] = read_log(log.read_text()) | {"ended": status}
        record.set("sanitize", found)
        errors = found[name]["errors"]
        print(f"sanitize: {name}: {status}, {'no summary' if errors is None else f'{errors} errors'}", flush=True)
        for text in found[name]["explained"]:
            print(f"  {text}", flush=True)


def read_log(text: str) -> dict[str, Any]:
    """The tool's own count, the ops that ran, what it said first."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    said = [line for line in text.splitlines() if line.startswith("=========")]
    hazards = Counter(re.findall(r"[Rr]ace reported between .*? in (\w+)", text))
    ran = [line for line in text.splitlines() if line and not line.startswith(("=", " "))]
    return {
        "errors": int(summary[1]) if summary else None,
        "ran": len(ran),
        "failed": [line.strip() for line in text.splitlines() if line.startswith("  FAILED")],
        "said": "\n".join(said)[:TAIL],
        "explained": [EXPLAINED.format(count=n, kernel=k) for k, n in sorted(hazards.items()) if k.startswith(COPIES)],
    }
