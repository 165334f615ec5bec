"""Where the compiled CUDA kernels come from: NVRTC compiles them at the first use, for exactly the GPU at hand."""

from __future__ import annotations

from fastlm.cuda import _nvrtc, _sources


def options(dtype: str, arch: str) -> list[str]:
    kind = "compute" if arch.endswith("ptx") else "sm"
    return [
        f"--gpu-architecture={kind}_{arch.removesuffix('ptx')}",
        "--std=c++17",
        "--device-as-default-execution-space",  # the constexpr functions of the headers
        f"-DFASTLM_DTYPE={_sources.DTYPES[dtype]}",
    ]


def compiler() -> _nvrtc.Compiler:
    found, why = _nvrtc.find()
    if found is None:
        raise ImportError(why)
    return found


def compile(op: str, dtype: str, arch: str) -> bytes:
    """The cubin of csrc/cuda/<op>.cu, made by NVRTC now.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        arch: "80", "90a", ...; with "ptx" behind it PTX.

    Raises:
        ImportError: there is no NVRTC.
        CompileError: with NVRTC's log.
    """
    return compiler().compile(_sources.closure(f"cuda/{op}.cu", _sources.folder()), options(dtype, arch))[0]


def load(op: str, dtype: str, arch: int) -> bytes:
    """What the launchers ask for: the binary for a GPU of this compute capability, 80 for 8.0."""
    return compile(op, dtype, "90a" if arch == 90 else str(arch))


def missing() -> str | None:
    """Why there can be no binary, or None."""
    return _nvrtc.find()[1] or None
