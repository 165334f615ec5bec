"""The CUDA kernels on a CPU: builds csrc/cuda with g++ over csrc/cuda/emulation, and runs pytest on it.

    python -m tests.emulation                             the tests of the ops, in every order of threads
    python -m tests.emulation tests/ops/test_gelu.py -x   what pytest is given instead

The build is instrumented with AddressSanitizer and UndefinedBehaviorSanitizer, any finding of which ends the process.
It stays in build/emulation; ninja repeats only what changed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "emulation"
ORDERS = ("forward", "reversed", "shuffled")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-fno-math-errno",
         "-ffp-contract=fast", "-mfma", "-mf16c", "-DFASTLM_CUDA", "-DFASTLM_EMULATED"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
INSTALLED = False
"""Whether this process runs the CUDA kernels on CPU tensors."""


def build(sanitize: bool = True) -> Path:
    """The extension module, built where it is not up to date."""
    import ninja
    import pybind11

    folder = BUILD / ("sanitized" if sanitize else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    extra = SANITIZE if sanitize else []
    flags = " ".join([*FLAGS, *extra, f"-I{ROOT / 'csrc'}"])
    lines = [
        "rule cxx\n  command = g++ -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared {' '.join(extra)} -o $out $in",
    ]
    objects = []

    def compile_unit(source: Path, name: str, flags: str) -> None:
        objects.append(folder / f"{name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {flags}")

    for source in [*sorted(SOURCE.glob("*.cpp")), SOURCE / "emulation" / "emulator.cpp"]:
        if source.name != "driver.cpp":
            compile_unit(source, source.stem, flags)
    for source in sorted(SOURCE.glob("*.cu")):
        for dtype in range(3):
            unit = f"{flags} -x c++ -DFASTLM_OP='\"{source.stem}\"' -DFASTLM_DTYPE={dtype}"
            compile_unit(source, f"{source.stem}.{dtype}", unit)
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']} -I{ROOT / 'csrc'}"
    compile_unit(ROOT / "csrc" / "bindings.cpp", "bindings", " ".join([*FLAGS, includes]))
    lines.append(f"build {target}: link {' '.join(map(str, objects))}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder, "--quiet"], check=True)
    return target


def install(path: Path) -> None:
    """From here on backend "cuda" takes CPU tensors, in every op that has it."""
    global INSTALLED
    from dataclasses import replace

    from fastlm import cuda
    from fastlm._dispatch import Op

    loader = importlib.machinery.ExtensionFileLoader("fastlm._cuda", str(path))
    spec = importlib.util.spec_from_loader("fastlm._cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    cuda.emulate(module)
    for op in Op.registry.values():
        if "cuda" in op.rows:
            op.rows["cuda"] = replace(op.rows["cuda"], devices=frozenset({"cpu"}))
    INSTALLED = True


def main() -> int:
    arguments = sys.argv[1:] or ["-q", "tests/cuda", "tests/ops", "tests/optim"]
    if "FASTLM_EMULATION" not in os.environ:
        build()
        # AddressSanitizer has to be the first library of the process, and finds what throws in the second.
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libstdc++.so.6")
        ]
        environment = {
            **os.environ,
            "FASTLM_EMULATION": "1",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:quarantine_size_mb=64",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run([sys.executable, "-m", "tests.emulation", *arguments], env=environment).returncode
    import pytest

    from tests import emulation

    emulation.install(build())
    return pytest.main(["--capture=sys", *arguments])  # the sanitizers write to stderr as they end the process


if __name__ == "__main__":
    sys.exit(main())
