"""The CUDA kernels on a CPU: builds csrc/cuda with g++ over csrc/cuda/emulation, and runs pytest on it.

    python -m tests.emulation                             the tests of the ops, in every order of threads
    python -m tests.emulation tests/ops/test_gelu.py -x   what pytest is given instead

The build is instrumented with AddressSanitizer and UndefinedBehaviorSanitizer, any finding of which ends the process.
It stays in build/emulation; ninja repeats only what changed.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from fastlm.cuda import _sources

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda"
PROBES = ROOT / "tests" / "cuda"
BUILD = ROOT / "build" / "emulation"
ORDERS = ("forward", "reversed", "shuffled")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-fno-math-errno",
         "-ffp-contract=fast", "-mfma", "-mf16c", "-DFASTLM_CUDA", "-DFASTLM_EMULATED"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RUNNING = "_FASTLM_SANITIZED"
"""Set by main() for the process that it starts again, with the sanitizer's library in front."""
INSTALLED = False
"""Whether this process runs the CUDA kernels on CPU tensors."""


MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
PROBE = "libprobe.so"
"""Kernels of tests/cuda/probe*.cu, for the tests of the emulation itself."""


@functools.cache
def build() -> Path:
    """The folder with MODULE and PROBE, built where they are not up to date."""
    import ninja
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    flags = " ".join([*FLAGS, *SANITIZE, f"-I{ROOT / 'csrc'}"])
    lines = [
        "rule cxx\n  command = g++ -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared {' '.join(SANITIZE)} -o $out $in",
    ]

    def compile_object(source: Path, name: str, flags: str) -> str:
        lines.append(f"build {name}.o: cxx {source}\n  flags = {flags}")
        return f"{name}.o"

    def kernels(unit: _sources.Unit, root: Path) -> list[str]:
        """An object for each dtype, its namespace fastlm::cuda renamed: on a GPU each is a program of its own, and here
        the linker would take one's inline functions for those of all."""
        objects = []
        for dtype in unit.target.dtypes:
            value = _sources.DTYPES[dtype]
            own = f"-DFASTLM_OP='\"{unit.name}\"' -DFASTLM_DTYPE={value} -Dcuda=cuda_{unit.name}_{value}"
            given = " ".join([flags, "-x c++", own, *unit.flags])
            objects.append(compile_object(root / unit.source, f"{unit.name}.{dtype}", given))
        return objects

    common = [SOURCE / "launch.cpp", *sorted((SOURCE / "emulation").glob("*.cpp"))]
    shared = [compile_object(source, source.stem, flags) for source in common]
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']} -I{ROOT / 'csrc'}"
    objects = [*shared, compile_object(ROOT / "csrc" / "bindings.cpp", "bindings", " ".join([*FLAGS, includes]))]
    for source in sorted(SOURCE.glob("*.cpp")):
        if source not in common and source.name != "driver.cpp":
            objects.append(compile_object(source, source.stem, flags))
    for unit in _sources.units(ROOT / "csrc").values():
        objects += kernels(unit, ROOT / "csrc")
    lines.append(f"build {MODULE}: link {' '.join(objects)}")
    probe = [*shared, compile_object(PROBES / "probe.cpp", "probe", flags)]
    for source in sorted(PROBES.glob("probe*.cu")):
        probe += kernels(_sources.Unit(source.stem, source.name), PROBES)
    lines.append(f"build {PROBE}: link {' '.join(probe)}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    # Neither the compiler nor ninja is what is examined.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "--quiet"], check=True, env=environment)
    return BUILD


def missing() -> str | None:
    """Why the emulation cannot run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it switches threads in the way of Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


def install(path: Path) -> None:
    """From here on backend "cuda" takes CPU tensors, in every op that has it."""
    global INSTALLED
    from dataclasses import replace

    from fastlm import cuda
    from fastlm._dispatch import Op

    name = "tests._cuda"  # under "fastlm._cuda" pybind11 would give back the launchers, where they are built
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
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
    reason = missing()
    if reason is not None:
        print(f"the CUDA kernels are not emulated: {reason}")
        return 0
    if RUNNING not in os.environ:
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
            RUNNING: "1",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:quarantine_size_mb=64",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run([sys.executable, "-m", "tests.emulation", *arguments], env=environment).returncode
    import pytest

    from tests import emulation

    emulation.install(build() / MODULE)
    return pytest.main(["--capture=sys", *arguments])  # the sanitizers write to stderr as they end the process


if __name__ == "__main__":
    sys.exit(main())
