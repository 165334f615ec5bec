"""Compiles csrc/cuda for every chip and looks at what came out, without a GPU.

    python -m bench.cuda_binaries                       every unit, sm_80 to sm_120
    python -m bench.cuda_binaries gelu attention_ampere_forward attention_ampere_bias_64
                                                        all units of a source, or one
    python -m bench.cuda_binaries --chip sm_90a         one chip
    python -m bench.cuda_binaries --save                also write bench/results/cuda_binaries.json

Prints, for each instance of each kernel, registers and threads, bytes of static shared memory, and accesses of global
memory by width in bytes; says what breaks the rules (complaints()) and exits with 1. What a compilation gave is kept in
build/cuda_binaries under a digest of all it came from.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from bench import binaries
from bench.binaries import REGISTERS, Figures
from fastlm.cuda import _binaries, _nvrtc, _sources
from fastlm.cuda._sources import Unit

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cuda_binaries"
TABLE = binaries.Committed(ROOT / "bench" / "results" / "cuda_binaries.json")
"""By compiler and unit; rows are dtype and instance."""

UNITS = _sources.units(_sources.folder())
CHIPS = tuple(f"sm_{arch}" for arch in _sources.ARCHITECTURES)

NARROW = {
    "adam": r"adam_(begin|total)_0",  # a number a thread
    "attention": r"document_ranges_0",  # numbers of documents
    "cross_entropy": r"cross_entropy_prepare_0",  # labels and weights of classes
    "gelu": r"gelu_(forward|backward)_[024]",  # unaligned addresses
    "glu": r"glu_(forward|backward)_[024]",  # unaligned addresses or rows
    "norm": r"norm_\w+_0",  # unaligned addresses or rows; norm_parts: columns of float32
    "softmax": r"softmax_(forward|backward)_[1357]",  # addresses that differ from tensor to tensor
    "rope": r"rope_0",
    "embedding": r"embedding_(forward|starts)_0",  # unaligned rows; the search
}
"""By source, the instances (the whole name) that need have no access of 16 bytes: what moves element by element."""
IN_TURN = {
    "attention_ampere_backward": r"attention_ampere_backward_\d+",  # dq
    "attention_hopper_backward": r"attention_hopper_backward_\d+",  # dq
}
"""By source, the instances that may add floats to memory: their blocks do so one after the other."""
NEEDED = {
    "attention_ampere": ("mma", "LDGSTS"),
    "attention_hopper": ("wgmma", "UTMALDG"),
}
"""By how a source's name begins, what its instances must have: tensor cores, and copies that wait for nobody."""
FEEDING = ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKRED")
"""Counted where tensor cores are used: copies to shared memory by threads and by the copy engine, and from there."""


# --- compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def nvcc() -> str | None:
    return shutil.which("nvcc")


@functools.cache
def version() -> str:
    """Of the compiler. NVRTC and nvcc of the same version share their optimiser, but allot some registers otherwise."""
    nvrtc, _ = _nvrtc.find()
    if nvrtc is not None:
        return f"NVRTC {'.'.join(map(str, nvrtc.version))}"
    if nvcc() is None:
        raise FileNotFoundError(missing())
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {said.split('release ')[1].split(',')[0]}"


def missing() -> str | None:
    """Why nothing can be compiled or read here, or None."""
    nvrtc, why = _nvrtc.find()
    if nvrtc is None and nvcc() is None:
        return f"{why}; nvcc is not on PATH"
    return None if find_spec("triton") else "Triton is not installed, which brings the disassembler"


def chips(unit: Unit, dtype: str) -> list[str]:
    """What a unit is judged on: every chip, but of what is compiled for each head dimension those it was written for.
    There float16 differs from bfloat16 by names of instructions: one chip."""
    if unit.target == _sources.Target():
        return [*CHIPS]
    if not unit.target.ptx or dtype == "float16":
        return ["sm_90a"]
    return ["sm_80", "sm_90a"]


def compile(unit: Unit, dtype: str, chip: str) -> bytes:
    """Raises RuntimeError, also for a warning."""
    return with_nvrtc(unit, dtype, chip) if _nvrtc.find()[0] is not None else with_nvcc(unit, dtype, chip)


def with_nvrtc(unit: Unit, dtype: str, chip: str) -> bytes:
    source = _sources.closure(unit.source, _sources.folder())
    nvrtc, why = _nvrtc.find()
    if nvrtc is None:
        raise FileNotFoundError(why)
    binary, log = nvrtc.compile(source, _binaries.options(unit, dtype, chip.removeprefix("sm_")))
    if log:
        raise RuntimeError(log)
    return binary


def with_nvcc(unit: Unit, dtype: str, chip: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, flags = Path(folder, "kernel.cubin"), [f"-DFASTLM_DTYPE={_sources.DTYPES[dtype]}", *unit.flags]
        command = [str(nvcc()), "-cubin", "-O3", "-std=c++17", "-Werror", "all-warnings", f"-arch={chip}"]
        command += [f"-I{_sources.folder()}", *flags, "-o", str(path)]
        run = subprocess.run([*command, _sources.folder() / unit.source], capture_output=True, text=True)
        if said := (run.stderr + run.stdout).strip():  # also where ptxas makes wgmma wait for each other: a mere info
            raise RuntimeError(said)
        return path.read_bytes()


class Job(NamedTuple):
    unit: Unit
    dtype: str
    chip: str

    def digest(self) -> str:
        source = _sources.digest(_sources.closure(self.unit.source, _sources.folder()))
        reading = "".join(
            inspect.getsource(part) for part in (with_nvcc, _binaries.options, read, look, *binaries.READING)
        )
        return hashlib.sha256(repr([*self, version(), reading, source]).encode()).hexdigest()[:32]


def read(cubin: bytes) -> dict[str, Figures]:
    """By instance."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        figures, bounds = binaries.read_cubin(path, look), binaries.launch_bounds(path)
    return {
        name: {"registers": f["registers"], "most": bounds[name][1], "threads": bounds[name][0]} | f
        for name, f in figures.items()
    }


def look(sass: str) -> Figures:
    """What binaries.read_sass() finds, and FEEDING."""
    figures = binaries.read_sass(sass)
    if {"mma", "wgmma"} & {*figures}:
        found = re.findall(rf"\b({'|'.join(FEEDING)})\b", sass)
        figures |= {name: found.count(name) for name in FEEDING if name in found}
        if added := len(re.findall(r"\bUBLKRED[.\w]*\.ADD\.\w?F\d", sass)):
            figures["float atomics"] = figures.get("float atomics", 0) + added
    return figures


def figures(job: Job) -> dict[str, Figures]:
    """By instance; of a unit that does not compile the error, under the unit's name."""
    path = CACHE / job.digest()
    if not path.exists():
        try:
            found = read(compile(*job))
        except RuntimeError as error:
            return {job.unit.name: {"error": str(error)}}
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(path)  # another run never sees half a file
    return json.loads(path.read_text())


def collect(units: Iterable[Unit], wanted: Sequence[str], processes: int) -> dict[Job, dict[str, Figures]]:
    """On those of the wanted chips that each is judged on. Processes, because NVRTC compiles one program at a time in
    each."""
    jobs = [
        Job(u, dtype, chip) for u in units for dtype in u.target.dtypes for chip in chips(u, dtype) if chip in wanted
    ]
    version()  # finds the compiler, for all of them
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        return dict(zip(jobs, pool.map(figures, jobs), strict=True))


# --- judging ---------------------------------------------------------------------------------------------------------


def complaints(source: str, instance: str, f: Figures) -> list[str]:
    """What an instance's figures break; empty means nothing. source: the stem of its file."""
    if "error" in f:
        return [f"does not compile: {f['error']}"]
    found = []
    if f["spills"] or f["local"]:
        found.append(f"{f['spills']} spilling instructions, {f['local']} bytes of local memory")
    if f["registers"] > f["most"] or f["registers"] * f["threads"] > REGISTERS:
        found.append(f"{f['registers']} registers for {f['threads']} threads, {f['most']} allowed")
    if not wide(f) and not re.fullmatch(NARROW.get(source, ""), instance):
        found.append("no access of 16 bytes, and NARROW does not name it")
    if not exact(f) and not re.fullmatch(IN_TURN.get(source, ""), instance):
        found.append("atomics on floats, and IN_TURN does not name it: their order changes the bits")
    for part, names in NEEDED.items():
        if source.startswith(part) and (lacking := [name for name in names if not f.get(name)]):
            found.append(f"no {' and no '.join(lacking)}")
    return found


def stem(unit: Unit) -> str:
    return Path(unit.source).stem


def wide(f: Figures) -> bool:
    return bool({"16", "32"} & {*f["loads"], *f["stores"]})


def exact(f: Figures) -> bool:
    return not f.get("float atomics")


def unused(rows: dict[Job, dict[str, Figures]]) -> list[str]:
    """Exceptions that nothing needs: instances that NARROW names and that are wide, that IN_TURN names and that add no
    floats; sources of which they name none."""
    found = []
    for exceptions, keeps in ((NARROW, wide), (IN_TURN, exact)):
        for source in {stem(job.unit) for job in rows} & {*exceptions}:
            named: dict[str, list[bool]] = {}
            for job, instances in rows.items():
                for instance, f in instances.items():
                    if stem(job.unit) == source and re.fullmatch(exceptions[source], instance) and "error" not in f:
                        named.setdefault(instance, []).append(keeps(f))
            found += [instance for instance, each in named.items() if all(each)] if named else [source]
    return sorted(found)


def table(rows: dict[Job, dict[str, Figures]]) -> binaries.Table:
    """What is zero wherever the rules hold is left out."""
    result: binaries.Table = {}
    for (unit, dtype, chip), instances in rows.items():
        for instance, f in instances.items():
            kept = {name: value for name, value in f.items() if value or name not in ("local", "shared", "spills")}
            result.setdefault(unit.name, {}).setdefault(f"{dtype} {instance}", {})[chip] = kept
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_binaries", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sources = {stem(unit): "" for unit in UNITS.values()}
    parser.add_argument("names", nargs="*", metavar="unit", help=f"any of: {', '.join(sources)}; or one unit of them")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="compilations at a time")
    parser.add_argument("--save", action="store_true", help=f"write {TABLE.path.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="print complaints and differences as JSON, for the tests")
    options = parser.parse_args()
    names = {*options.names}
    if unknown := names - {*sources, *UNITS}:
        parser.error(f"no unit {', '.join(unknown)}; choose from {', '.join(sources)}")
    units = [unit for unit in UNITS.values() if not names or names & {unit.name, stem(unit)}]
    start = time.perf_counter()
    rows = collect(units, options.chip or CHIPS, options.processes)
    broken = [
        f"{job.unit.name} {job.dtype} {instance} on {job.chip}: {what}"
        for job, instances in rows.items()
        for instance, f in instances.items()
        for what in complaints(stem(job.unit), instance, f)
    ]
    now, old = table(rows), TABLE.read().get(version())
    changed = [] if old is None else binaries.differences(old, now, CHIPS)
    count = sum(map(len, rows.values()))
    if options.json:
        document = {"compiler": version(), "known": old is not None, "rows": count}
        print(json.dumps({**document, "complaints": broken, "differences": changed, "unused": unused(rows)}))
        return int(bool(broken))
    print(f"{'chip':7} {'regs':>4} {'most':>4} {'thr':>4} {'shared':>6}  {'loads':22} {'stores':22} instance")
    for job, instances in rows.items():
        for instance, f in instances.items():
            if "error" not in f:
                print(
                    f"{job.chip:7} {f['registers']:4} {f['most']:4} {f['threads']:4} {f['shared']:6}  "
                    f"{binaries.widths(f['loads']):22} {binaries.widths(f['stores']):22} {job.dtype} {instance}"
                )
    if options.save:
        TABLE.save(version(), now)
    elif changed:
        print("\nother than in the committed table:", *changed, sep="\n  ")
    if broken:
        print("\nbroken rules:", *broken, sep="\n  ")
    print(f"\n{count} instances from {len(rows)} compilations, {version()}, {time.perf_counter() - start:.0f} s")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
