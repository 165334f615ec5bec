"""Compiles the Triton kernels without a GPU, in the configurations they run in, and looks at what came out.

    python -m bench.ahead_of_time                    every op for sm_80, sm_90 and sm_100
    python -m bench.ahead_of_time attention gelu     some of them
    python -m bench.ahead_of_time --chip sm_90       one chip
    python -m bench.ahead_of_time --chip gfx942      AMD; minutes, so never in `make test`
    python -m bench.ahead_of_time --save             also write bench/results/ahead_of_time.json

Prints registers a thread, bytes of shared and local memory, spilling instructions, instructions of the matrix unit, and
accesses of global memory by width in bytes; says what breaks the rules (Case in __init__.py) and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import triton

from bench import binaries
from bench.ahead_of_time import _gate


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ahead_of_time", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of: {', '.join(_gate.OPS)}")
    parser.add_argument("--chip", action="append", choices=list(_gate.CHIPS), help="default: the three of NVIDIA")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="compilations at a time")
    parser.add_argument("--save", action="store_true", help=f"write {_gate.TABLE.path.relative_to(_gate.ROOT)}")
    parser.add_argument("--json", action="store_true", help="print complaints and differences as JSON, for the tests")
    options = parser.parse_args()
    unknown = [op for op in options.ops if op not in _gate.OPS]
    if unknown:
        parser.error(f"no op {', '.join(unknown)}; choose from {', '.join(_gate.OPS)}")
    start = time.perf_counter()
    rows = _gate.collect(options.ops or _gate.OPS, options.chip or _gate.DEFAULT)
    figures = _gate.compile_all(rows, options.processes)
    broken = [f"{row}: {what}" for row, f in zip(rows, figures, strict=True) for what in _gate.complaints(row, f)]
    now = _gate.table(rows, figures)
    old = _gate.TABLE.read().get(triton.__version__)
    changed = [] if old is None else binaries.differences(old, now, _gate.DEFAULT)
    if options.json:
        document = {"triton": triton.__version__, "known": old is not None, "rows": len(rows)}
        print(json.dumps({**document, "complaints": broken, "differences": changed}))
        return int(bool(broken))
    head = f"{'chip':7} {'regs':>5} {'thr':>5} {'shared':>7} {'local':>6} {'spills':>6} {'matrix':>12}  "
    print(f"{head}{'loads':22} {'stores':18} kernel")
    for row, f in zip(rows, figures, strict=True):
        if "error" not in f:
            matrix = " ".join(f"{k} {f[k]}" for k in ("wgmma", "mma", "tcgen05") if f.get(k)) or "-"
            print(
                f"{row.chip:7} {f['registers']:5} {f['threads']:5} {f['shared']:7} {f['local']:6} {f['spills']:6} "
                f"{matrix:>12}  {binaries.widths(f.get('loads', {})):22} {binaries.widths(f.get('stores', {})):18} "
                f"{row.op} {row.case.name}: {row.kernel}"
            )
    if options.save:
        _gate.TABLE.save(triton.__version__, now)
    elif changed:
        print("\nother than in the committed table:", *changed, sep="\n  ")
    if broken:
        print("\nbroken rules:", *broken, sep="\n  ")
    spent = sum(f.get("seconds", 0) for f in figures)
    print(f"\n{len(rows)} kernels, Triton {triton.__version__}, {spent:.0f} s of compilations, "
          f"{time.perf_counter() - start:.0f} s now")  # fmt: skip
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
