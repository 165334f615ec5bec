"""What is read from a compiled kernel, and the committed tables of it: bench/ahead_of_time (Triton) and
bench/cuda_binaries.py (CUDA C++).

The disassembler comes with Triton's wheel; no GPU is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every chip of NVIDIA since sm_80."""


# --- reading ---------------------------------------------------------------------------------------------------------


def tool(name: str, *arguments: str | Path) -> str:
    """What cuobjdump or nvdisasm prints."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        raise FileNotFoundError(f"{name} comes with Triton, which is not installed")
    path = Path(found.origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read_cubin(path: Path, read: Callable[[str], Figures]) -> dict[str, Figures]:
    """Registers of a thread, bytes of local and static shared memory, and what read() finds in its code, by kernel."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", "-res-usage", path)
    )
    if not usage:
        raise RuntimeError("cuobjdump -res-usage printed no figures")
    found = code(path)
    return {
        name: {"registers": int(registers), "local": int(stack) + int(local), "shared": int(shared)} | read(found[name])
        for name, registers, stack, shared, local in usage
    }


def code(path: Path) -> dict[str, str]:
    """Disassembly by kernel."""
    return dict(re.findall(r"^//-+ \.text\.(\S+) +-+\n(.*?)(?=^//-|\Z)", tool("nvdisasm", "-c", path), re.M | re.S))


def launch_bounds(path: Path) -> dict[str, tuple[int, int]]:
    """By kernel: threads of a block at most, and registers of a thread at most, as __launch_bounds__ limits them."""
    found = {}
    for name, text in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", tool("cuobjdump", "-elf", path), re.M | re.S):
        threads = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+)", text)
        registers = re.search(r"EIATTR_MAXREG_COUNT\s+Format:\s+\w+\s+Value:\s+(\w+)", text)
        if threads and registers:
            found[name] = int(threads[1], 16), int(registers[1], 16)
    return found


def read_sass(text: str) -> Figures:
    """Spilling instructions, products on the matrix unit, and accesses of global memory by their width in bytes."""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    names: Counter[str] = Counter()
    widths = {"loads": Counter[int](), "stores": Counter[int]()}
    inexact = 0
    for instruction in instructions:
        name, *modifiers = instruction.split(".")
        names[name] += 1
        if name in ("LDG", "STG", "LDGSTS"):
            widths["stores" if name == "STG" else "loads"][access_width(modifiers)] += 1
        elif name == "UTMALDG" or name == "UBLKCP":
            widths["loads"][16] += 1
        elif name == "UTMASTG":
            widths["stores"][16] += 1
        elif name in ATOMICS and any(re.match(r"B?F\d", modifier) for modifier in modifiers):
            inexact += 1
    figures: Figures = {"spills": names["STL"] + names["LDL"]}
    matrix = {"wgmma": "HGMMA", "mma": "HMMA", "tcgen05": r"UTC\w*MMA"}
    for key, pattern in matrix.items():
        count = sum(n for name, n in names.items() if re.fullmatch(pattern, name))
        if count:
            figures[key] = count
    for key, counts in widths.items():
        figures[key] = {str(width): counts[width] for width in sorted(counts, reverse=True)}
    atomics = sum(names[name] for name in ATOMICS)
    if atomics:
        figures["atomics"] = atomics
    if inexact:
        figures["float atomics"] = inexact
    return figures


ATOMICS = ("RED", "REDG", "REDAS", "ATOM", "ATOMG", "ATOMS")


def access_width(modifiers: list[str]) -> int:
    """Bytes of a load or store, by the modifiers of its instruction; .64 of the address comes after a space."""
    for modifier in modifiers:
        if modifier in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(modifier.lstrip("US")) // 8
    return 4


READING = (tool, read_cubin, code, read_sass, access_width, launch_bounds)
"""What figures depend on besides the binary."""


# --- the committed tables --------------------------------------------------------------------------------------------

Table = dict[str, dict[str, dict[str, Figures]]]
"""Figures by op, row, chip."""


@dataclass
class Committed:
    """A file of tables, by version of the compiler."""

    path: Path

    def read(self) -> dict[str, Table]:
        """Chips of equal figures share a line of the file."""
        if not self.path.exists():
            return {}
        document: dict[str, Table] = json.loads(self.path.read_text())
        for table in document.values():
            for rows in table.values():
                for name, by_chips in rows.items():
                    rows[name] = {chip: f for chips, f in by_chips.items() for chip in chips.split()}
        return document

    def save(self, version: str, new: Table) -> None:
        """Replaces the ops' figures on the chips that were compiled for. Sorted lines: diffs stay short."""
        document = self.read()
        old = document.setdefault(version, {})
        chips = {chip for rows in new.values() for by_chip in rows.values() for chip in by_chip}
        for op, rows in new.items():
            before = old.get(op, {})
            kept = {name: {c: f for c, f in by.items() if c not in chips} for name, by in before.items()}
            for name, by_chip in rows.items():
                kept.setdefault(name, {}).update(by_chip)
            old[op] = {name: by for name, by in kept.items() if by}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(_dump(document, depth=4) + "\n")


def _fold(by_chip: dict[str, Figures]) -> dict[str, Figures]:
    """The inverse of what read() does to a row."""
    found: dict[str, tuple[list[str], Figures]] = {}
    for chip in sorted(by_chip, key=lambda chip: (len(chip.strip("a")), chip)):
        found.setdefault(json.dumps(by_chip[chip]), ([], by_chip[chip]))[0].append(chip)
    return {" ".join(chips): figures for chips, figures in found.values()}


def _dump(value: Any, depth: int, indent: str = "") -> str:
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + " "
    if depth == 1:
        value = _fold(value)
    lines = [f"{inner}{json.dumps(key)}: {_dump(value[key], depth - 1, inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def differences(old: Table, new: Table, default: Collection[str]) -> list[str]:
    """What the committed table says of the ops and chips in new, and new does not, and the other way round.

    default: the chips that the table is about.
    """
    found = []
    chips = {chip for rows in new.values() for by_chip in rows.values() for chip in by_chip} & set(default)
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


def widths(counts: dict[str, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in counts.items()) or "-"
