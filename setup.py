"""Builds `fastlm._C` with ninja: every csrc/cpu/*.cpp once per instruction set, plus one pybind11 unit.

Needs setuptools, pybind11, ninja and a C++17 compiler; never torch. Without a compiler the package still installs
and runs on its PyTorch reference. CXX names the compiler, MAX_JOBS limits parallel jobs.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISAS = {  # name -> flags; explicit flags, because -march=native would tie the wheel to this machine
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The sources with an AMX variant; the rest use their AVX-512 one there.
AMX_SOURCES = {"table.cpp", "attention_forward.cpp", "attention_backward.cpp"}
SHARED_SOURCES = {"dispatch.cpp"}  # compiled once, for the baseline

BASE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno",
              "-fno-trapping-math", "-ffp-contract=fast"]  # fmt: skip


def compiles(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler takes these flags (old ones lack AMX, Apple's lacks OpenMP)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*cxx.split(), "-Werror", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]) and compiles(name, []):
            return name
    return None


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


def ninja_file(cxx: str, build: Path, target: Path) -> str:
    """The text of build.ninja: one rule to compile, one to link, one line per object."""
    import pybind11

    def quote(path: object) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    openmp = ["-fopenmp"] if compiles(cxx, ["-fopenmp"]) else []
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = {name: flags for name, flags in ISAS.items() if name == "generic" or (x86 and compiles(cxx, flags))}
    have = [f"-DFASTLM_HAVE_{name.upper()}" for name in isas]
    # GCC 12 takes the undefined operands inside its own intrinsics for ours.
    quiet = [flag for flag in ("-Wno-uninitialized", "-Wno-maybe-uninitialized") if compiles(cxx, [flag])]
    base = [*BASE_FLAGS, *quiet, *openmp, f"-I{quote(ROOT / 'csrc')}"]

    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
        "  description = compile $out",
        f"rule link\n  command = {cxx} -shared -o $out $in {' '.join(openmp)} {'-s' if sys.platform == 'linux' else ''}"
        f"{' -undefined dynamic_lookup' if sys.platform == 'darwin' else ''}\n  description = link $out",
    ]
    objects = []

    def compile_unit(source: Path, name: str, flags: list[str]) -> None:
        objects.append(build / name)
        lines.append(f"build {quote(objects[-1])}: cxx {quote(source)}\n  flags = {' '.join([*base, *flags])}")

    for source in sorted(CPU.glob("*.cpp")):
        if source.name in SHARED_SOURCES:
            compile_unit(source, f"{source.stem}.o", have)
            continue
        for isa, flags in isas.items():
            if isa != "amx" or source.name in AMX_SOURCES:
                compile_unit(source, f"{source.stem}.{isa}.o", [*flags, f"-DFASTLM_ISA={isa}", *have])
    # The one pybind11 unit is the longest to compile and has no arithmetic in it.
    includes = [f"-I{quote(pybind11.get_include())}", f"-I{quote(sysconfig.get_paths()['include'])}"]
    compile_unit(ROOT / "csrc" / "bindings.cpp", "bindings.o", ["-O1", *includes])
    lines.append(f"build {quote(target)}: link {' '.join(quote(o) for o in objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Builds with ninja in place of setuptools' own compiler driver, which knows no per-file flags."""

    built: Path | None = None

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("fastlm._C")).resolve()
        for stale in {target, ROOT / "fastlm" / target.name}:  # never ship what an earlier configuration built
            stale.unlink(missing_ok=True)
        cxx = find_compiler()
        if cxx is None:
            message = "no working C++17 compiler (tried $CXX, g++, clang++, c++)"
            print(
                f"\n*** fastlm: {message}. Installing without fused CPU kernels: every op will run on its "
                "PyTorch reference. Install a compiler and reinstall to have them. ***\n",
                file=sys.stderr,
            )
            return
        # Always here, so that an editable install recompiles only what changed; pip's own folder is a temporary one.
        build = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(cxx, build, target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([find_ninja(), "-C", str(build), *jobs])
        self.built = target
        if self.inplace:
            self.copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [str(self.built)] if self.built else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Editable installs load the extension from the source tree."""
        if self.built is not None and self.built.parent != ROOT / "fastlm":
            shutil.copy2(self.built, ROOT / "fastlm")


packages = find_namespace_packages(include=["fastlm", "fastlm.*"])
package_dir = {}
if not (ROOT / "fastlm" / "kernels").is_dir():  # a checkout that lost the symbolic link
    packages = [p for p in packages if not p.startswith("fastlm.kernels")]
    packages += ["fastlm.kernels", *(f"fastlm.kernels.{p}" for p in find_namespace_packages("kernels"))]
    package_dir = {"fastlm.kernels": "kernels"}

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"fastlm": ["py.typed", "*.pyi"], "": ["*.cu", "*.cuh"]},
    ext_modules=[Extension("fastlm._C", [])],  # marks the wheel as built for one platform
    cmdclass={"build_ext": NinjaBuild},
)
