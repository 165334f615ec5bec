"""Everything there is to do on a GPU, in one command.

    python -m bench.gpu --out DIR                            all of it
    python -m bench.gpu --out DIR --stage ops --minutes 9    one stage, within a time; may be given several times
    python -m bench.gpu --out DIR --stage tune --minutes 9   sweep the tiles of attention, print the best

    build      the C++ extensions where they are missing or stale, CUDA binaries for this GPU; versions
    test       the tests that run on the GPU, a summary with every failure
    sanitize   compute-sanitizer on odd shapes of every op, on each backend of ours
    ceilings   copy bandwidth on random data, matrix products: what the shares below are of
    ops        every op on Triton and on CUDA C++, beside torch, torch.compile and whatever of Liger-Kernel and quack
               is installed
    attention  16 Ki tokens of 2048 channels in sequences of 512 to 16 Ki, D = 64, 128, 256, on Triton and on CUDA C++,
               beside SDPA's flash and cuDNN backends and whatever flash-attn is installed
    train      a GPT's training step beside the same model in plain PyTorch, compiled or not

DIR/results.json is whole after each measurement, so an interrupt loses the one under way. A second run into the same
DIR replaces what it measures again and keeps the rest. Where the minutes do not suffice the least important sizes,
which come last, are dropped and named. Needs no network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu import checks, tables
from bench.gpu.record import ROOT, Record

STAGES = {"build": 1, "test": 8, "sanitize": 4, "ceilings": 1, "ops": 8, "attention": 6, "train": 4}
"""With the share of the minutes left that a stage may take, against those after it."""
GRACE = 30.0
"""Seconds after which a measuring process that does not end by itself is ended."""


def measure(record: Record, stage: str, device: str, until: float, small: bool) -> Record:
    """Runs the stage's process, again from where it stopped when an item kills it. Returns what is on disk then."""
    command = [sys.executable, "-m", "bench.gpu.worker", stage, "--out", str(record.path.parent)]
    command += ["--device", device, "--until", str(until), *(["--small"] if small else [])]
    while True:
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = process.wait(max(until + GRACE - time.time(), 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        record = Record(record.path.parent)
        if code == 0:
            return record
        running = record.data.get("running")
        why = "did not end" if code is None else f"its process ended with status {code}"
        record.note("failed", stage, running["name"] if running else "start", why)
        record.finish()
        if code is None or running is None:
            return record


def run(stages: list[str], out: Path, minutes: float, device: str, small: bool) -> Record:
    record = Record(out)
    record.begin(stages)
    deadline = time.time() + 60 * minutes
    for position, stage in enumerate(stages):
        left, weights = deadline - time.time(), [STAGES.get(s, 8) for s in stages[position:]]
        until = time.time() + max(left, 0) * weights[0] / sum(weights)
        print(f"--- {stage}: until {time.strftime('%H:%M:%S', time.localtime(until))}", flush=True)
        if stage == "build":
            checks.build(record, device)
        elif stage == "test":
            checks.test(record, until, small)
        elif stage == "sanitize":
            checks.sanitize(record, device, until)
        else:
            record = measure(record, stage, device, until, small)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, plots and logs")
    parser.add_argument("--stage", action="append", choices=[*STAGES, "tune", "all"], help="default: all")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, its figures mean nothing"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a dry run")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --small is a dry run")
    chosen = options.stage or ["all"]
    stages = [stage for stage in [*STAGES, "tune"] if stage in chosen or ("all" in chosen and stage != "tune")]
    measuring = [stage for stage in stages if stage in ("ops", "attention", "train")]
    known = Record(options.out).data
    if "build" not in stages and not known["about"]:
        stages.insert(0, "build")
    if measuring and "ceilings" not in stages and not known["ceilings"]:
        stages.insert(stages.index(measuring[0]), "ceilings")
    interrupted = False
    try:
        run(stages, options.out, options.minutes, options.device, options.small)
    except KeyboardInterrupt:
        interrupted = True
    record = Record(options.out)
    plots = tables.plot(record.data, options.out)
    print(*tables.summary(record.data), sep="\n")
    print(f"written: {', '.join(str(p) for p in [record.path, *plots])}")
    if interrupted:
        return 130
    failures = record.data.get("tests", {}).get("failures")
    return int(bool(record.data["failed"] or failures))


if __name__ == "__main__":
    sys.exit(main())
