"""The sources of the CUDA kernels: csrc/common.h and csrc/cuda, as packaged or in a checkout, and their digests.

Standard library alone: setup.py reads this file too, where there is no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Values of FASTLM_DTYPE: every .cu is compiled once for each."""
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
"""What is compiled ahead of time; the last one also as PTX, for GPUs to come."""
PATTERNS = ("common.h", "cuda/*.h", "cuda/*.cuh", "cuda/*.cu")

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


def ops(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "cuda").glob("*.cu"))


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


def digests(op: str, root: Path) -> dict[str, str]:
    """kernel: all that csrc/cuda/<op>.cu is made of. interface: the part it shares with the launcher, cuda/<op>.h."""
    return {
        "kernel": digest(closure(f"cuda/{op}.cu", root)),
        "interface": digest(closure(f"cuda/{op}.h", root)),
    }
