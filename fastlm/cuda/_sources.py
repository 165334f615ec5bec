"""The sources of the CUDA kernels: csrc/common.h and csrc/cuda, as packaged or in a checkout; the units they are
compiled to; digests.

A unit is a module of kernels of its own: a .cu with some definitions, compiled once per dtype. Most sources are one
unit of the same name, for every dtype and architecture; those of PER_HEAD_DIM are one for each head dimension.

Standard library alone: setup.py reads this file too, where there is no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Values of FASTLM_DTYPE: a unit is compiled once for each of its own."""
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
"""What is compiled ahead of time; the last one also as PTX, for GPUs to come."""
PATTERNS = ("common.h", "cuda/*.h", "cuda/*.cuh", "cuda/*.cu")


class Target(NamedTuple):
    """What a unit is compiled for."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    architectures: tuple[str, ...] = ()
    """What alone is compiled ahead of time; empty for whatever is asked for."""
    ptx: str = ""
    """What GPUs compile from that none of the architectures serves; empty: those never run it."""
    front: str = ""
    """The architecture whose PTX all binaries are made of; empty: SAME_PTX says it."""


class Unit(NamedTuple):
    name: str
    source: str
    """As an #include gives it."""
    target: Target = Target()
    flags: tuple[str, ...] = ()


AMPERE = Target(("bfloat16", "float16"), ("80", "90a"), "80")
AMPERE_ALONE = AMPERE._replace(front="80")  # without what sm_90 adds to mma.cuh
SELDOM = AMPERE_ALONE._replace(architectures=("80",))
HOPPER = Target(("bfloat16", "float16"), ("90a",))
PER_HEAD_DIM = {
    "attention_ampere_forward": ((32, 64, 96, 128, 192, 256), AMPERE_ALONE),
    "attention_ampere_backward": ((32, 64, 96, 128, 192, 256), AMPERE),
    "attention_ampere_bias": ((32, 64, 96, 128, 192, 256), SELDOM),
    "attention_hopper_forward": ((64, 128, 256), HOPPER),
    "attention_hopper_backward": ((64, 128, 256), HOPPER),
}
"""Sources that are compiled once for each of these FASTLM_HEAD_DIM, and for what. attention.h says which one a call
takes."""

SAME_BINARY = {"89": "86"}
"""The binary of the first has the instructions of the second's, which runs there."""
SAME_PTX = {"86": "80", "89": "80", "120": "100"}
"""The PTX of the first is that of the second but for its name, unless a source asks for one of them. Making PTX is two
thirds of a compilation."""

_ASKS_FOR_ONE = re.compile(r"__CUDA_ARCH__ ==")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def number(arch: str) -> int:
    """90 for "90a"."""
    return int(arch.rstrip("af"))


def folder() -> Path:
    """csrc: beside this file in an installed package, three folders up in a checkout."""
    packaged = Path(__file__).parent / "csrc"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "csrc"


def files(root: Path) -> dict[str, Path]:
    """Name, as an #include gives it -> file."""
    return {path.relative_to(root).as_posix(): path for pattern in PATTERNS for path in sorted(root.glob(pattern))}


def units(root: Path) -> dict[str, Unit]:
    """By name."""
    found: list[Unit] = []
    for path in sorted((root / "cuda").glob("*.cu")):
        source = f"cuda/{path.name}"
        if path.stem in PER_HEAD_DIM:
            widths, target = PER_HEAD_DIM[path.stem]
            found += [Unit(f"{path.stem}_{w}", source, target, (f"-DFASTLM_HEAD_DIM={w}",)) for w in widths]
        else:
            found.append(Unit(path.stem, source))
    return {unit.name: unit for unit in found}


def serves(architectures: Iterable[str], ptx: Iterable[str], arch: int) -> bool:
    """Whether a fatbin of these runs on a GPU of this compute capability, 80 for 8.0.

    A binary runs on its own major number from its own minor on, one with a letter on that very chip alone; PTX on
    everything from its number on.
    """
    for name in architectures:
        own = number(name)
        if arch == own or (name.isdigit() and arch // 10 == own // 10 and arch > own):
            return True
    return any(arch >= int(name) for name in ptx)


def runs(target: Target, arch: int) -> bool:
    """Whether there can be a binary for a GPU of this compute capability."""
    return bool(target.ptx) or not target.architectures or serves(target.architectures, (), arch)


def chosen(target: Target, asked: list[str], ptx: list[str]) -> tuple[list[str], list[str]]:
    """What binaries and what PTX to make where these are asked for; no binaries: nothing at all."""
    asked = [a for a in asked if SAME_BINARY.get(a) not in asked]
    own = [a for a in target.architectures if any(serves([a], (), number(each)) for each in asked)]
    if target.architectures and not target.ptx:
        return own, []
    if not own:
        return asked, ptx
    rest = ptx or not all(serves(own, (), number(each)) for each in asked)
    return own, [target.ptx] if rest else []


def codes(unit: Unit, asked: list[str], ptx: list[str], root: Path) -> list[tuple[str, str]]:
    """What to put into a fatbin where these are chosen(): of PTX of which architecture, and what is made of it."""
    shared = SAME_PTX if not _ASKS_FOR_ONE.search("".join(closure(unit.source, root).values())) else {}

    def front(arch: str) -> str:
        return unit.target.front or (shared[arch] if shared.get(arch) in asked else arch)

    return [(front(a), f"sm_{a}") for a in asked] + [(front(a), f"compute_{front(a)}") for a in ptx]


def closure(name: str, root: Path) -> dict[str, str]:
    """The texts of a file and of all that it includes, itself first. What PATTERNS leaves out is for the host alone."""
    known = files(root)
    found: dict[str, str] = {}
    open_ = [name]
    while open_:
        name = open_.pop()
        if name in known and name not in found:
            found[name] = known[name].read_text()
            open_ += _INCLUDE.findall(found[name])
    return found


def digest(texts: dict[str, str]) -> str:
    """Of names and texts, in whatever order."""
    hashed = hashlib.sha256()
    for name, text in sorted(texts.items()):
        for part in (name, text):
            hashed.update(f"{len(part.encode())}:".encode() + part.encode())
    return hashed.hexdigest()


def digests(unit: Unit, root: Path) -> dict[str, str]:
    """kernel: all that the unit is made of. interface: the .h of it, which are what it shares with the launchers."""
    texts = closure(unit.source, root)
    return {
        "kernel": digest(texts),
        "interface": digest({name: text for name, text in texts.items() if name.endswith(".h")}),
    }
