"""From a case to figures: record its launches, compile each for a chip, read the binary.

Triton compiles without a GPU and brings cuobjdump and nvdisasm. Each compilation is a forked process of its own: LLVM
aborts the process where it cannot select an instruction, and that must not take the others down. What a compilation
gave is kept in build/ahead_of_time under a digest of all it came from (the kernel's source with all it calls, its
signature, constants and options, the chip, Triton's version, the code that reads it), so a later run repeats nothing
and never shows an old figure.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import binaries
from bench.ahead_of_time import Case
from bench.binaries import REGISTERS, Figures
from fastlm.kernels._launch import OPTIONS, Launch, Target, recording

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ahead_of_time"
OPS = sorted(p.stem for p in HERE.glob("[a-z]*.py"))

CHIPS = {
    "sm_80": Target("cuda", 80, 108, 163 << 10),  # A100
    "sm_90": Target("cuda", 90, 132, 227 << 10),  # H100, H200
    "sm_100": Target("cuda", 100, 148, 227 << 10),  # B200
    "gfx942": Target("hip", 0, 304, 64 << 10),  # MI300X
}
DEFAULT = ("sm_80", "sm_90", "sm_100")


class Row(NamedTuple):
    """One kernel of one case on one chip."""

    op: str
    case: Case
    kernel: str
    """Its name, numbered from the second on where a case launches it in several configurations."""
    chip: str
    launch: Launch

    def __str__(self) -> str:
        return f"{self.op} {self.case.name}: {self.kernel} on {self.chip}"


# --- recording -------------------------------------------------------------------------------------------------------


def collect(ops: Iterable[str], chips: Iterable[str]) -> list[Row]:
    """The launches of every case, each configuration once a case."""
    rows = []
    for op in ops:
        for case in importlib.import_module(f"bench.ahead_of_time.{op}").cases():
            for chip in chips:
                with recording(CHIPS[chip]) as launches:
                    case.run()
                if not launches:
                    raise RuntimeError(f"{op} {case.name} launched nothing")
                seen: set[str] = set()
                times: Counter[str] = Counter()
                for launch in launches:
                    key = digest(launch, chip)
                    if key in seen:
                        continue
                    seen.add(key)
                    name = launch.kernel.__name__
                    times[name] += 1
                    rows.append(Row(op, case, name if times[name] == 1 else f"{name} #{times[name]}", chip, launch))
    return rows


def digest(launch: Launch, chip: str) -> str:
    parts = [
        triton.__version__, _reading(), launch.kernel.cache_key, sorted(launch.signature.items()),
        sorted((name, str(value)) for name, value in launch.constants.items()),
        launch.divisible, launch.num_warps, launch.num_stages, sorted(OPTIONS.items()), chip,
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_all(rows: list[Row], processes: int = 2, warm: bool = False) -> list[Figures]:
    """Figures of every row; those of a failed compilation hold its error instead.

    warm: leave the binaries in Triton's own cache, where a launch on this machine finds them.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    keys = [digest(row.launch, row.chip) for row in rows]
    waiting = {key: row for key, row in zip(keys, rows, strict=True) if not (CACHE / key).exists()}
    running: dict[int, tuple[str, Row]] = {}
    done = 0
    failures: dict[str, Figures] = {}
    queue = list(waiting.items())
    if len(queue) > 4:
        _warm_up()
    while queue or running:
        while queue and len(running) < processes:
            key, row = queue.pop(0)
            running[_fork(row, CACHE / key, warm)] = key, row
        pid, status = os.wait()
        key, row = running.pop(pid)
        done += 1
        if sys.stderr.isatty():
            print(
                f"\r{done}/{len(waiting)} {str(row)[:100]:100}", end="" if queue or running else "\n", file=sys.stderr
            )
        if not (CACHE / key).exists():
            said = CACHE / f"{key}.error"
            ended = f"the compiler's process ended with status {os.waitstatus_to_exitcode(status)}"
            failures[key] = {"error": said.read_text() if said.exists() else ended}
            said.unlink(missing_ok=True)
    return [failures.get(key) or json.loads((CACHE / key).read_text()) for key in keys]


@triton.jit
def _nothing(x):
    tl.store(x, 0)


@functools.cache
def _warm_up() -> None:
    """What the first compilation of a process costs more than the next, 0.4 s, is paid once: the forks inherit it."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        triton.compile(ASTSource(_nothing, {"x": "*fp32"}), target=GPUTarget("cuda", 90, 32), options=dict(OPTIONS))


def _fork(row: Row, path: Path, warm: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # The other threads are those of numpy's matrix library, which a child never calls.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        with tempfile.TemporaryDirectory() as folder:
            if not warm:
                triton.knobs.cache.dir = folder
            try:
                text = json.dumps(compile_one(row.launch, row.chip, Path(folder)))
            except Exception as error:  # a kernel that does not compile is a result like any other, but never kept
                traceback.print_exc()
                text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                path = path.with_suffix(".error")
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(text)
            scratch.replace(path)  # another run never sees half a file
    finally:
        os._exit(0)


def source(launch: Launch) -> ASTSource:
    """What Triton itself would compile at the launch, to the hash, so that a warmed cache serves it.

    Triton lists what it knows of each argument but floats, also where that is nothing; 3.6 leaves constants out.
    """
    without = ("fp", "constexpr") if triton.__version__.startswith("3.6.") else ("fp",)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, kind in enumerate(launch.signature.values()):
        if position in launch.divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif not kind.startswith(without):
            attributes[(position,)] = []
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    return ASTSource(launch.kernel, launch.signature, constants, attributes)


def compile_one(launch: Launch, chip: str, folder: Path) -> Figures:
    target = CHIPS[chip]
    start = time.perf_counter()
    gpu = GPUTarget("hip", chip, 64) if target.backend == "hip" else GPUTarget("cuda", target.arch, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
    compiled = triton.compile(source(launch), target=gpu, options=options)
    figures = {"threads": compiled.metadata.num_warps * gpu.warp_size}
    if target.backend == "hip":
        figures |= read_amdgcn(compiled.asm["amdgcn"])
    else:
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        figures |= next(iter(binaries.read_cubin(path, binaries.read_sass).values()))
    figures["shared"] = max(figures["shared"], compiled.metadata.shared)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures


# --- reading ---------------------------------------------------------------------------------------------------------


def read_amdgcn(text: str) -> Figures:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly does not say {name}")
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "local": metadata("private_segment_fixed_size"),
        "shared": metadata("group_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "mma": len(re.findall(r"^\s*v_mfma", text, re.MULTILINE)),
    }


@functools.cache
def _reading() -> str:
    """The code above that figures depend on."""
    return "".join(inspect.getsource(part) for part in (source, compile_one, read_amdgcn, *binaries.READING))


# --- judging ---------------------------------------------------------------------------------------------------------


def complaints(row: Row, figures: Figures) -> list[str]:
    """What the figures of a row break; empty means nothing."""
    if "error" in figures:
        return [f"does not compile: {figures['error']}"]
    target, kernel = CHIPS[row.chip], row.launch.kernel.__name__
    found = []
    allowed = row.case.spills.get(kernel, 0)
    if figures["spills"] > allowed:
        found.append(f"{figures['spills']} spilling instructions, {allowed} allowed")
    if figures["shared"] > target.shared:
        found.append(f"{figures['shared']} bytes of shared memory, the chip has {target.shared}")
    if target.backend == "hip":
        return found
    if figures["registers"] * figures["threads"] > REGISTERS:
        found.append(f"{figures['registers']} registers for {figures['threads']} threads, the chip has {REGISTERS}")
    if kernel in row.case.wgmma and row.chip == "sm_90" and not figures.get("wgmma"):
        found.append("no wgmma")
    narrow = row.case.narrow_of(kernel)
    if narrow is not None:
        widths = Counter[int]()
        for key in ("loads", "stores"):
            widths.update({int(width): count for width, count in figures[key].items()})
        below = {f"{width} bytes": count for width, count in widths.items() if width < 16}
        if sum(below.values()) > narrow:
            found.append(f"accesses narrower than 16 bytes: {below}, {narrow} allowed")
        if not sum(count for width, count in widths.items() if width >= 16):
            found.append("no access of 16 bytes")
    return found


# --- the committed table ---------------------------------------------------------------------------------------------

TABLE = binaries.Committed(ROOT / "bench" / "results" / "ahead_of_time.json")
"""By version of Triton; rows are case and kernel."""


def table(rows: list[Row], figures: list[Figures]) -> binaries.Table:
    result: binaries.Table = {}
    for row, values in zip(rows, figures, strict=True):
        kept = {name: value for name, value in values.items() if name != "seconds"}
        result.setdefault(row.op, {}).setdefault(f"{row.case.name}: {row.kernel}", {})[row.chip] = kept
    return result
