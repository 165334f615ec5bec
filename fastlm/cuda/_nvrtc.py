"""NVRTC, NVIDIA's run-time compiler, through ctypes. It needs no GPU, no driver, no toolkit and no header file."""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

OLDEST = (12, 0)
"""The first with sm_90a."""


class CompileError(RuntimeError):
    """NVRTC refused a source; its log is in the message."""


def _folders() -> Iterator[str]:
    """Where libnvrtc may lie: torch's own CUDA packages first, which match the driver that torch needs."""
    spec = importlib.util.find_spec("nvidia")
    for parent in spec.submodule_search_locations or () if spec else ():
        yield from sorted(glob.glob(f"{parent}/cu[0-9]*/lib"), reverse=True)
        yield f"{parent}/cuda_nvrtc/lib"
    yield str(Path(torch.__file__).parent / "lib")
    yield f"{sys.prefix}/lib"  # conda
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            yield f"{toolkit}/lib64"
            yield f"{toolkit}/lib"


def candidates() -> list[str]:
    """Every libnvrtc there is, in order of preference. The .alt ones are twins for other uses."""
    found = []
    for folder in _folders():
        names = [path for path in glob.glob(f"{folder}/libnvrtc[.-]*so*") if not re.search(r"builtins|\.alt\.", path)]
        found += sorted(names, key=len)[-1:]  # libnvrtc.so.13 rather than the link libnvrtc.so
    wanted = (torch.version.cuda or "").partition(".")[0]
    return sorted(dict.fromkeys(found), key=lambda path: not (wanted and path.endswith(f".so.{wanted}")))


class Compiler:
    """One loaded libnvrtc."""

    def __init__(self, path: str) -> None:
        # It opens its builtins by their bare name, which the loader finds only once they are there.
        for builtins in sorted(glob.glob(f"{os.path.dirname(path)}/libnvrtc-builtins*.so*")):
            if ".alt." not in builtins:
                ctypes.CDLL(builtins)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        supported = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", supported)
        self.path = path
        self.version = (major.value, minor.value)
        self.architectures = sorted(supported)
        self.size = os.path.getsize(path)
        """Tells builds of the same version apart."""
        if self.version < OLDEST:
            raise OSError(f"{path} is version {major.value}.{minor.value}, below {OLDEST[0]}.{OLDEST[1]}")

    def _check(self, function: str, *arguments: object) -> None:
        result = getattr(self._library, function)(*arguments)
        if result != 0:
            raise OSError(f"{function}: {self._library.nvrtcGetErrorString(result).decode()}")

    def compile(self, sources: dict[str, str], options: list[str]) -> tuple[bytes, str]:
        """The first of the sources; the others are what it may include. Returns the binary, and the log of warnings.

        A cubin for --gpu-architecture=sm_*, PTX for compute_*.
        """
        (name, text), *headers = sources.items()
        program = ctypes.c_void_p()
        strings = ctypes.c_char_p * len(headers)
        self._check(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            text.encode(),
            name.encode(),
            len(headers),
            strings(*(body.encode() for _, body in headers)),
            strings(*(header.encode() for header, _ in headers)),
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if result != 0:
                reason = self._library.nvrtcGetErrorString(result).decode()
                raise CompileError(f"NVRTC {self.version[0]}.{self.version[1]}: {name} {options}: {reason}\n{log}")
            kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
            return self._read(program, kind), log
        finally:
            self._check("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


@functools.cache
def find() -> tuple[Compiler | None, str]:
    """The compiler, or None and why there is none."""
    reasons = []
    for path in candidates():
        try:
            return Compiler(path), ""
        except OSError as error:  # not for this machine, or too old: the next may do
            reasons.append(str(error))
        except AttributeError as error:  # a function is missing
            reasons.append(f"{path} is too old: {error}")
    return None, "; ".join(reasons) or "NVRTC was not found (pip install nvidia-cuda-nvrtc brings it)"
