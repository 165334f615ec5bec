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
import subprocess
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

from bench.ahead_of_time import Case
from fastlm.kernels._launch import OPTIONS, Launch, Target, recording

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ahead_of_time"
COMMITTED = ROOT / "bench" / "results" / "ahead_of_time.json"
OPS = sorted(p.stem for p in HERE.glob("[a-z]*.py"))

CHIPS = {
    "sm_80": Target("cuda", 80, 108, 163 << 10),  # A100
    "sm_90": Target("cuda", 90, 132, 227 << 10),  # H100, H200
    "sm_100": Target("cuda", 100, 148, 227 << 10),  # B200
    "gfx942": Target("hip", 0, 304, 64 << 10),  # MI300X
}
DEFAULT = ("sm_80", "sm_90", "sm_100")
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every chip above that starts with sm."""

Figures = dict[str, Any]


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
        figures |= read_cubin(compiled.asm["cubin"], folder)
    figures["shared"] = max(figures["shared"], compiled.metadata.shared)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures


# --- reading ---------------------------------------------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read_cubin(cubin: bytes, folder: Path) -> Figures:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(path)))
    if found is None:
        raise RuntimeError("cuobjdump -res-usage printed no figures")
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "local": stack + local, "shared": shared} | read_sass(
        _tool("nvdisasm", "-c", str(path))
    )


def read_sass(text: str) -> Figures:
    """Spilling instructions, products on the matrix unit, and accesses of global memory by their width in bytes."""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    names: Counter[str] = Counter()
    widths = {"loads": Counter[int](), "stores": Counter[int]()}
    for instruction in instructions:
        name, *modifiers = instruction.split(".")
        names[name] += 1
        if name in ("LDG", "STG", "LDGSTS"):
            widths["stores" if name == "STG" else "loads"][access_width(modifiers)] += 1
        elif name == "UTMALDG" or name == "UBLKCP":
            widths["loads"][16] += 1
        elif name == "UTMASTG":
            widths["stores"][16] += 1
    figures: Figures = {"spills": names["STL"] + names["LDL"]}
    matrix = {"wgmma": "HGMMA", "mma": "HMMA", "tcgen05": r"UTC\w*MMA"}
    for key, pattern in matrix.items():
        count = sum(n for name, n in names.items() if re.fullmatch(pattern, name))
        if count:
            figures[key] = count
    for key, counts in widths.items():
        figures[key] = {str(width): counts[width] for width in sorted(counts, reverse=True)}
    atomics = names["RED"] + names["REDG"] + names["ATOM"] + names["ATOMG"]
    if atomics:
        figures["atomics"] = atomics
    return figures


def access_width(modifiers: list[str]) -> int:
    """Bytes of a load or store, by the modifiers of its instruction; .64 of the address comes after a space."""
    for modifier in modifiers:
        if modifier in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(modifier.lstrip("US")) // 8
    return 4


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
    parts = (source, compile_one, read_cubin, read_sass, access_width, read_amdgcn)
    return "".join(inspect.getsource(part) for part in parts)


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

Table = dict[str, dict[str, dict[str, Figures]]]
"""Figures by op, case and kernel, chip."""


def committed() -> dict[str, Table]:
    """By version of Triton."""
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}


def table(rows: list[Row], figures: list[Figures]) -> Table:
    result: Table = {}
    for row, values in zip(rows, figures, strict=True):
        kept = {name: value for name, value in values.items() if name != "seconds"}
        result.setdefault(row.op, {}).setdefault(f"{row.case.name}: {row.kernel}", {})[row.chip] = kept
    return result


def differences(old: Table, new: Table) -> list[str]:
    """What the committed table says of the ops and chips in new, and new does not, and the other way round."""
    found = []
    chips = {chip for kernels in new.values() for by_chip in kernels.values() for chip in by_chip} & set(DEFAULT)
    for op in new:
        was, now = old.get(op, {}), new[op]
        for name in sorted({*was, *now}):
            for chip in sorted(chips):
                a, b = was.get(name, {}).get(chip), now.get(name, {}).get(chip)
                if a != b:
                    changed = [k for k in {**(a or {}), **(b or {})} if (a or {}).get(k) != (b or {}).get(k)]
                    text = ", ".join(f"{k} {(a or {}).get(k)} -> {(b or {}).get(k)}" for k in changed)
                    what = "is not in the table" if a is None else "is in the table alone" if b is None else text
                    found.append(f"{op} {name} on {chip}: {what}")
    return found


def save(new: Table) -> None:
    """Replaces the ops' figures on the chips that were compiled for. One line a chip, sorted: diffs stay short."""
    document = committed()
    old = document.setdefault(triton.__version__, {})
    chips = {chip for kernels in new.values() for by_chip in kernels.values() for chip in by_chip}
    for op, kernels in new.items():
        before = old.get(op, {})
        kept = {name: {c: f for c, f in by.items() if c not in chips} for name, by in before.items()}
        for name, by_chip in kernels.items():
            kept.setdefault(name, {}).update(by_chip)
        old[op] = {name: by for name, by in kept.items() if by}
    COMMITTED.parent.mkdir(exist_ok=True)
    COMMITTED.write_text(_dump(document, depth=4) + "\n")


def _dump(value: Any, depth: int, indent: str = "") -> str:
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_dump(value[key], depth - 1, inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
