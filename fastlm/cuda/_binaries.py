"""Where the compiled CUDA kernels come from: the package, the disk cache, or NVRTC, in this order.

The package holds them when nvcc was there at the build (setup.py). Otherwise they are compiled at the first use from
the same sources, for exactly the GPU at hand, and kept under ~/.cache/fastlm ($XDG_CACHE_HOME).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastlm.cuda import _nvrtc, _sources

PACKAGED = Path(__file__).parent / "binaries"


def options(unit: _sources.Unit, dtype: str, arch: str) -> list[str]:
    """NVRTC's, for an architecture as compile() takes it."""
    kind = "compute" if arch.endswith("ptx") else "sm"
    return [
        f"--gpu-architecture={kind}_{arch.removesuffix('ptx')}",
        "--std=c++17",
        "--device-as-default-execution-space",  # the constexpr functions of the headers
        f"-DFASTLM_DTYPE={_sources.DTYPES[dtype]}",
        *unit.flags,
    ]


def compile(name: str, dtype: str, arch: str) -> bytes:
    """The cubin of a unit, made by NVRTC now.

    Args:
        name: "gelu", "attention_ampere_forward_64": _sources.units().
        dtype: "float32", "bfloat16" or "float16".
        arch: "80", "90a", ...; with "ptx" behind it PTX.

    Raises:
        ImportError: there is no NVRTC.
        CompileError: with NVRTC's log.
    """
    unit = _units()[name]
    return _compiler().compile(_sources.closure(unit.source, _sources.folder()), options(unit, dtype, arch))[0]


def load(name: str, dtype: str, arch: int) -> bytes:
    """What the launchers ask for: the binary (cubin, fatbin or PTX) for a GPU of this compute capability, 80 for 8.0.

    Raises:
        ImportError: neither packaged nor compilable.
        RuntimeError: the launchers were built from other sources; CompileError.
    """
    unit = _units().get(name)
    if unit is None or dtype not in unit.target.dtypes or not _sources.runs(unit.target, arch):
        raise ImportError(f"there is no {name} in {dtype} for sm_{arch}")
    built = manifest().get("units", {}).get(name)
    if built is not None and built["interface"] != _sources.digests(unit, _sources.folder())["interface"]:
        # The launchers would pass another struct than the kernels take.
        raise RuntimeError(f"the headers of csrc/{unit.source} are not what fastlm._cuda was built from; "
                           "install fastlm again")  # fmt: skip
    if _is_packaged(name, arch):
        return (PACKAGED / f"{name}.{dtype}.fatbin").read_bytes()
    return _cached(unit, dtype, target(unit.target, arch, _compiler().architectures))


def missing(archs: Iterable[int]) -> str | None:
    """Why there can be no binary for GPUs of these compute capabilities, or None."""
    units = _units().values()
    unserved = sorted(
        {arch for arch in archs if not all(_is_packaged(u.name, arch) for u in units if _sources.runs(u.target, arch))}
    )
    if not unserved:
        return None
    compiler, why = _nvrtc.find()
    if compiler is not None:
        return None
    reason = manifest().get("reason")
    if reason is None:
        reason = f"they were made for {', '.join(manifest().get('architectures', []))}, or of other sources"
    gpus = ", ".join(f"sm_{arch}" for arch in unserved)
    return f"no compiled kernels for {gpus} are in the package ({reason}) and none can be compiled: {why}"


def describe() -> dict[str, Any]:
    """What `fastlm info` says of them, in types that JSON has."""
    compiler, why = _nvrtc.find()
    folder = cache_folder()
    return {
        "packaged": {name: manifest().get(name) for name in ("nvcc", "architectures", "ptx", "seconds", "reason")},
        "nvrtc": {
            "path": compiler.path if compiler else None,
            "version": ".".join(map(str, compiler.version)) if compiler else None,
            "missing": why or None,
        },
        "cache": str(folder) if folder else None,
    }


@functools.cache
def manifest() -> dict[str, Any]:
    """What setup.py recorded of the build; empty where it never ran."""
    path = PACKAGED / "manifest.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


@functools.cache
def _is_packaged(name: str, arch: int) -> bool:
    """Whether the package has a binary of today's sources for this GPU. It is passed over where it may be too new for
    the driver: torch for CUDA 12 needs no driver that takes what nvcc 13 makes, and brings an NVRTC of its own."""
    built = manifest().get("units", {}).get(name)
    if built is None or not _sources.serves(built["architectures"], built["ptx"], arch):
        return False
    if built["kernel"] != _sources.digests(_units()[name], _sources.folder())["kernel"]:
        return False
    nvcc = manifest()["nvcc"]
    torch_cuda = torch.version.cuda or nvcc
    newer = int(nvcc.partition(".")[0]) > int(torch_cuda.partition(".")[0])
    return not (newer and _nvrtc.find()[0] is not None)


def target(unit: _sources.Target, arch: int, supported: Iterable[int]) -> str:
    """What to compile for a GPU of this compute capability, with a compiler that supports these.

    Raises:
        ImportError: the GPU is older than all of them.
    """
    if unit.ptx and not _sources.serves(unit.architectures, (), arch):
        return f"{unit.ptx}ptx"  # as in the package: the kernels were fitted to the registers of that
    older = [number for number in supported if number <= arch]
    if not older:
        raise ImportError(f"NVRTC compiles for {min(supported)} and newer, the GPU is {arch}")
    newest = max(older)
    if newest // 10 == arch // 10:
        return "90a" if newest == 90 else str(newest)
    return f"{newest}ptx"  # the driver compiles the rest


def _units() -> dict[str, _sources.Unit]:
    return _sources.units(_sources.folder())


def _compiler() -> _nvrtc.Compiler:
    found, why = _nvrtc.find()
    if found is None:
        raise ImportError(why)
    return found


def cache_folder() -> Path | None:
    """None without a home directory."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache if cache and os.path.isabs(cache) else Path.home() / ".cache") / "fastlm"
    except RuntimeError:
        return None


def _cached(unit: _sources.Unit, dtype: str, arch: str) -> bytes:
    """compile(), once per machine. A file is the SHA-256 of the binary, then the binary: half a file is no file."""
    compiler = _compiler()
    sources = _sources.closure(unit.source, _sources.folder())
    flags = options(unit, dtype, arch)
    identity = json.dumps([_sources.digest(sources), flags, compiler.version, compiler.size])
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = cache_folder()
    path = None if folder is None else folder / f"{unit.name}.{dtype}.sm_{arch}.{key}.cubin"
    if path is not None:
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if content and content[:32] == hashlib.sha256(content[32:]).digest():
            return content[32:]
    binary, _ = compiler.compile(sources, flags)
    if path is not None:
        _keep(path, hashlib.sha256(binary).digest() + binary)
    return binary


def _keep(path: Path, content: bytes) -> None:
    """Written beside it and moved: another process sees all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        _warn_once(f"compiled CUDA kernels cannot be kept in {path.parent} and are compiled again by every process: "
                   f"{error.strerror}")  # fmt: skip


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
