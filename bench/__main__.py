"""One table of every op against its peers, each timed in turn in one process.

    python -m bench                          every suite, default and tuned malloc
    python -m bench layer_norm adam          some of them
    python -m bench --malloc tuned           one malloc setting
    python -m bench cpu                      what is promised of a CPU, and whether it holds: bench/cpu/run.py

A suite is refused where the op's tests fail.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = sorted(
    p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py") if "\ndef cases(" in p.read_text()
)
MALLOC = ("default", "tuned")


def gate(suite: str) -> None:
    """Runs the op's tests, once for each state of the sources. Raises SystemExit when they fail."""
    tests = sorted((ROOT / "tests" / "ops").glob(f"test_{suite}*.py"))
    if not tests:
        return
    patterns = ("tests/ops/*.py", "csrc/**/*", "kernels/*.py", "fastlm/**/*.py")
    sources = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.is_file())).hexdigest()[:16]
    stamp = ROOT / "build" / f"tested-{suite}-{digest}"
    if stamp.exists():
        return
    print(f"testing {suite} first ...", file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *map(str, tests)], cwd=ROOT).returncode:
        raise SystemExit(f"bench: tests/ops/test_{suite}*.py fail; a wrong result is not timed")
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()


def worker(suites: list[str], malloc: str) -> None:
    """Times the suites in this process under one malloc setting; prints a JSON line for each case."""
    import fastlm
    from bench.harness import dtype_name, measure, measure_ceilings

    if malloc == "tuned":
        fastlm.tune_malloc()
    ceilings = measure_ceilings()
    print(json.dumps({"copy": ceilings.copy, "product": {dtype_name(d): r for d, r in ceilings.products.items()}}))
    for suite in suites:
        for case in importlib.import_module(f"bench.bench_{suite}").cases():
            result = measure(case)
            row = {
                "op": case.op,
                "shape": case.shape,
                "dtype": dtype_name(case.dtype),
                "malloc": malloc,
                "seconds": result.medians,
                "best_peer": result.best_peer,
                "ratio": result.ratio,
                "share": ceilings.share(result),
            }
            print(json.dumps(row), flush=True)


def run(suites: list[str], malloc: str) -> None:
    """The worker in its own process, because a malloc setting cannot be taken back; prints rows as they come."""
    command = [sys.executable, "-m", "bench", "--worker", "--malloc", malloc, *suites]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            print(line, end="")
            continue
        record = json.loads(line)
        if "copy" in record:
            products = ", ".join(f"{d} product {r / 1e9:.0f} GFLOP/s" for d, r in record["product"].items())
            print(f"\nmalloc {malloc}: copy {record['copy'] / 1e9:.1f} GB/s, {products}")
            print(
                f"{'op':22} {'shape':>20} {'dtype':>9} {'fastlm ms':>10} {'ratio':>6} {'best peer':>10} "
                f"{'vs eager':>8} {'of ceiling':>10}"
            )
            continue
        eager = record["seconds"].get("eager")
        versus = f"{eager / record['seconds']['fastlm']:.2f}x" if eager else ""
        print(
            f"{record['op']:22} {record['shape']:>20} {record['dtype']:>9} {record['seconds']['fastlm'] * 1e3:10.2f} "
            f"{record['ratio']:5.2f}x {record['best_peer']:>10} {versus:>8} {record['share']:10.0%}",
            flush=True,
        )
    if process.wait():
        raise SystemExit(f"bench: the {malloc} run failed with status {process.returncode}")


def main() -> None:
    if sys.argv[1:2] == ["cpu"]:
        from bench.cpu.run import main as cpu

        return cpu(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"any of: {', '.join(SUITES)}")
    parser.add_argument(
        "--malloc", choices=MALLOC, action="append", help="malloc of both sides (default: each in turn)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    suites = options.suites or SUITES
    unknown = [s for s in suites if s not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    if options.worker:
        return worker(suites, options.malloc[0])
    for suite in suites:
        gate(suite)
    for malloc in options.malloc or MALLOC:
        run(suites, malloc)


if __name__ == "__main__":
    main()
