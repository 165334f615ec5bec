"""Builds `fastlm._C` and `fastlm._cuda` with ninja, and the CUDA kernels where there is an nvcc.

_C: every csrc/cpu/*.cpp once per instruction set, plus one pybind11 unit. _cuda (Linux): the launchers, which are
csrc/cuda/*.cpp; they open the CUDA driver at run time and link nothing of CUDA. Kernels: every unit of csrc/cuda/*.cu
(fastlm/cuda/_sources.py) once per dtype, for its architectures, to fastlm/cuda/binaries/<unit>.<dtype>.fatbin; without
nvcc they are compiled at the first use, from the sources in the package.

Needs setuptools, pybind11, ninja and a C++17 compiler; never torch. Without a compiler the package still installs
and runs on its PyTorch reference; what goes wrong with _cuda does not take _C down. From the environment: CXX names the
compiler, MAX_JOBS limits parallel jobs, CUDA_HOME says where nvcc is, FASTLM_CUDA_ARCHS says what to compile the CUDA
kernels for: "90a", "80 90a 120+PTX", or "none".
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CPU, CUDA = CSRC / "cpu", CSRC / "cuda"

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISAS = {  # name -> flags; explicit flags, because -march=native would tie the wheel to this machine
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The sources with an AMX variant; the rest use their AVX-512 one there.
AMX_SOURCES = {"table.cpp", "attention_forward.cpp", "attention_backward.cpp", "linear.cpp"}
SHARED_SOURCES = {"dispatch.cpp"}  # compiled once, for the baseline

BASE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno",
              "-fno-trapping-math", "-ffp-contract=fast"]  # fmt: skip
NVCC_FLAGS = ["-fatbin", "-std=c++17", "-O3", "-Xfatbin", "-compress-all", "-allow-unsupported-compiler"]
OLDEST_NVCC = (12, 0)  # the first with sm_90a


def load_sources() -> Any:
    """fastlm/cuda/_sources.py, by its path: importing fastlm would need torch."""
    spec = importlib.util.spec_from_file_location("_sources", ROOT / "fastlm" / "cuda" / "_sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCES = load_sources()


def say(message: str) -> None:
    print(f"\n*** fastlm: {message} ***\n", file=sys.stderr)


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


class Nvcc(NamedTuple):
    path: str
    version: str
    architectures: list[str]  # "80", "90a"
    ptx: list[str]


def gencode(codes: list[tuple[str, str]]) -> list[str]:
    """Of PTX of which architecture, what to put into the file."""
    return [flag for front, code in codes for flag in ("-gencode", f"arch=compute_{front},code={code}")]


def wanted_architectures() -> tuple[list[str], list[str]]:
    """What to make binaries for, and what PTX, as FASTLM_CUDA_ARCHS or the default says."""
    asked = os.environ.get("FASTLM_CUDA_ARCHS", f"{' '.join(SOURCES.ARCHITECTURES)}+PTX").strip()
    binaries, ptx = [], []
    for name in re.split(r"[\s,;]+", "" if asked.lower() == "none" else asked):
        found = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?)(\+PTX)?", name, re.IGNORECASE)
        if found:
            binaries.append(found[1])
            ptx += [str(SOURCES.number(found[1]))] if found[2] else []
        elif name:
            sys.exit(f"FASTLM_CUDA_ARCHS must be 'none' or a list like '80 90a 120+PTX', got {asked!r}")
    return binaries, ptx


def nvcc_candidates() -> list[str]:
    """Every nvcc there may be, in order of preference. It may be a wrapper script: it is only ever run."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    found += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    # pip's package; an isolated build has the site-packages of the Python it builds for in no other place.
    for folder in dict.fromkeys([*sys.path, *(sysconfig.get_path(p) for p in ("purelib", "platlib"))]):
        found += map(str, sorted(Path(folder or ".", "nvidia").glob("cu*/bin/nvcc"), reverse=True))
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


def probe_nvcc(path: str) -> Nvcc | str:
    """This nvcc with the architectures it can compile for, or why it is of no use."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([path, *arguments], capture_output=True, text=True, errors="replace")

    try:
        version = re.search(r"release (\d+)\.(\d+), V([\d.]+)", run("--version").stdout)
        if version is None:
            return f"{path} does not tell its version"
        if (int(version[1]), int(version[2])) < OLDEST_NVCC:
            return f"{path} is version {version[3]}, below {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
        known = re.findall(r"sm_(\d+)", run("--list-gpu-code").stdout)
        asked, ptx = wanted_architectures()
        architectures = [a for a in asked if str(SOURCES.number(a)) in known]
        if lacking := [a for a in asked if a not in architectures]:
            say(f"nvcc {version[3]} does not know {', '.join(f'sm_{a}' for a in lacking)}: left out. A GPU of that "
                "kind has its kernels compiled at the first use")  # fmt: skip
        if not architectures:
            return f"{path}, version {version[3]}, knows none of {', '.join(asked)}"
        if ptx:  # of the newest there is, where the newest asked for is left out
            ptx = [a for a in ptx if a in known] or [str(SOURCES.number(architectures[-1]))]
        nvcc = Nvcc(path, version[3], architectures, ptx)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("__global__ void probe() {}\n")
            flags = [*NVCC_FLAGS, *gencode([(a, f"sm_{a}") for a in architectures])]
            tried = run(*flags, "-o", str(source.with_suffix(".fatbin")), str(source))
        if tried.returncode != 0:
            return f"{path} cannot compile an empty kernel: {(tried.stderr or tried.stdout).strip()[-300:]}"
        return nvcc
    except OSError as error:
        return f"{path} does not run: {error}"


def find_nvcc() -> tuple[Nvcc | None, str]:
    """The first nvcc that works, or None and why."""
    if not wanted_architectures()[0]:
        return None, "FASTLM_CUDA_ARCHS asks for none"
    reasons = []
    for path in nvcc_candidates():
        found = probe_nvcc(path)
        if isinstance(found, Nvcc):
            return found, ""
        reasons.append(found)
    return None, "; ".join(reasons) or "no nvcc in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or pip's packages"


def ninja_quote(path: object) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaFile:
    """The text of build.ninja: a line per object, and what belongs to which target."""

    def __init__(self, cxx: str, build: Path) -> None:
        import pybind11

        self.cxx, self.build = cxx, build
        self.openmp = ["-fopenmp"] if compiles(cxx, ["-fopenmp"]) else []
        # GCC 12 takes the undefined operands inside its own intrinsics for ours.
        quiet = [flag for flag in ("-Wno-uninitialized", "-Wno-maybe-uninitialized") if compiles(cxx, [flag])]
        self.base = [*BASE_FLAGS, *quiet, f"-I{ninja_quote(CSRC)}"]
        self.python = [f"-I{ninja_quote(path)}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        linker = ["-s"] if sys.platform == "linux" else []
        linker += ["-undefined dynamic_lookup"] if sys.platform == "darwin" else []
        self.lines = [
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "  description = compile $out",
            f"rule link\n  command = {cxx} -shared -o $out $in {' '.join(linker)} $flags\n  description = link $out",
        ]

    def add(self, target: Path, rule: str, sources: list[Path], flags: list[str]) -> Path:
        line = f"build {ninja_quote(target)}: {rule} {' '.join(map(ninja_quote, sources))}"
        self.lines.append(f"{line}\n  flags = {' '.join(flags)}")
        return target

    def cpu(self, target: Path) -> None:
        """fastlm._C."""
        x86 = platform.machine() in ("x86_64", "AMD64")
        isas = {n: flags for n, flags in ISAS.items() if n == "generic" or (x86 and compiles(self.cxx, flags))}
        have = [f"-DFASTLM_HAVE_{name.upper()}" for name in isas]
        objects = []

        def unit(source: Path, name: str, flags: list[str]) -> None:
            objects.append(self.add(self.build / name, "cxx", [source], [*self.base, *self.openmp, *flags]))

        for source in sorted(CPU.glob("*.cpp")):
            if source.name in SHARED_SOURCES:
                unit(source, f"{source.stem}.o", have)
                continue
            for isa, flags in isas.items():
                if isa != "amx" or source.name in AMX_SOURCES:
                    unit(source, f"{source.stem}.{isa}.o", [*flags, f"-DFASTLM_ISA={isa}", *have])
        # The one pybind11 unit is the longest to compile and has no arithmetic in it.
        unit(CSRC / "bindings.cpp", "bindings.o", ["-O1", *self.python])
        self.add(target, "link", objects, self.openmp)

    def launchers(self, target: Path) -> None:
        """fastlm._cuda."""
        objects = [
            self.add(self.build / f"cuda_{source.stem}.o", "cxx", [source], self.base)
            for source in sorted(CUDA.glob("*.cpp"))
        ]
        flags = [*self.base, "-O1", "-DFASTLM_CUDA", *self.python]
        objects.append(self.add(self.build / "cuda_bindings.o", "cxx", [CSRC / "bindings.cpp"], flags))
        self.add(target, "link", objects, ["-ldl", "-pthread"])

    def kernels(self, nvcc: Nvcc) -> list[Path]:
        """The fatbins. Their folder is named after the compiler, so that another one compiles them again."""
        folder = self.build / f"nvcc-{nvcc.version}"
        folder.mkdir(exist_ok=True)
        flags = [*NVCC_FLAGS, "-Werror", "all-warnings", f"-I{ninja_quote(CSRC)}"]
        command = f"{ninja_quote(shlex.quote(nvcc.path))} {' '.join(flags)} $flags -MD -MF $out.d -o $out $in"
        self.lines.append(
            f"rule nvcc\n  command = {command} && times > $out.times\n  depfile = $out.d\n  deps = gcc\n"
            "  description = compile $out"
        )
        fatbins = []
        for unit in SOURCES.units(CSRC).values():
            codes = SOURCES.codes(unit, *SOURCES.chosen(unit.target, nvcc.architectures, nvcc.ptx), CSRC)
            for dtype in unit.target.dtypes if codes else ():
                flags = [*gencode(codes), f"-DFASTLM_DTYPE={SOURCES.DTYPES[dtype]}", *unit.flags]
                fatbins.append(self.add(folder / f"{unit.name}.{dtype}.fatbin", "nvcc", [CSRC / unit.source], flags))
        return fatbins


def compile_seconds(outputs: list[Path]) -> float:
    """Processor time that compiling these took, whenever it was: what the shell's `times` says of its children."""
    found = [re.findall(r"(\d+)m([\d.]+)s", Path(f"{path}.times").read_text())[2:] for path in outputs]
    return round(sum(60 * int(minutes) + float(seconds) for times in found for minutes, seconds in times), 1)


class NinjaBuild(build_ext):
    """Builds with ninja in place of setuptools' own compiler driver, which knows no per-file flags."""

    def run(self) -> None:
        self.built: list[Path] = []
        target = Path(self.get_ext_fullpath("fastlm._C")).resolve()
        self.package = target.parent
        launchers = self.package / target.name.replace("_C", "_cuda", 1)
        for package in {self.package, ROOT / "fastlm"}:  # never ship what an earlier configuration built
            for stale in (target, launchers):
                (package / stale.name).unlink(missing_ok=True)
            shutil.rmtree(package / "cuda" / "binaries", ignore_errors=True)
        if self.package != ROOT / "fastlm":
            shutil.rmtree(self.package / "cuda" / "csrc", ignore_errors=True)
            for name, path in SOURCES.files(CSRC).items():
                self.put(path, self.package / "cuda" / "csrc" / name)
        cxx = find_compiler()
        if cxx is None:
            message = "no working C++17 compiler (tried $CXX, g++, clang++, c++)"
            say(f"{message}. Installing without fused CPU kernels: every op will run on its PyTorch reference. "
                "Install a compiler and reinstall to have them.")  # fmt: skip
            self.record(message, None, message, [], 0.0)
        else:
            self.package.mkdir(parents=True, exist_ok=True)
            self.compile(cxx, target, launchers)
        if self.inplace:
            self.copy_extensions_to_source()

    def compile(self, cxx: str, target: Path, launchers: Path) -> None:
        # Always here, so that an editable install recompiles only what changed; pip's own folder is a temporary one.
        build = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

        ninja = [find_ninja(), "-C", str(build), *jobs, "-k", "0"]

        def made(*goals: object) -> bool:
            done = subprocess.run([*ninja, "-n", *map(str, goals)], capture_output=True, text=True)
            return "no work to do" in done.stdout

        text = NinjaFile(cxx, build)
        text.cpu(target)
        fatbins: list[Path] = []
        nvcc, why, trouble = None, "", None
        if sys.platform == "linux":
            text.launchers(launchers)
            nvcc, why = find_nvcc()
            fatbins = text.kernels(nvcc) if nvcc else []
        else:
            trouble = why = f"the CUDA kernels are for Linux, this is {sys.platform}"
        (build / "build.ninja").write_text("\n".join(text.lines) + "\n")
        start = time.monotonic()
        if subprocess.run(ninja).returncode != 0:
            if not made(target):
                sys.exit("fastlm: compiling fastlm._C failed, see above")
            if not trouble and not made(launchers):
                trouble = f"compiling fastlm._cuda with {cxx} failed when fastlm was installed"
                say(f"{trouble}, see above. Installing without it: the CUDA kernels will not be there")
                launchers.unlink(missing_ok=True)
            if nvcc and fatbins and not made(*fatbins):
                sys.exit(f"fastlm: {nvcc.path} {nvcc.version} failed to compile the CUDA kernels, see above. "
                         "FASTLM_CUDA_ARCHS=none installs without, to compile them at the first use")  # fmt: skip
        self.built += [target] if trouble else [target, launchers]
        for path in fatbins:
            self.put(path, self.package / "cuda" / "binaries" / path.name)
        seconds = compile_seconds(fatbins)
        self.record(trouble, nvcc, why, fatbins, seconds)
        print(f"fastlm: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
        if nvcc:
            size = sum(path.stat().st_size for path in fatbins) / 1e6
            print(f"fastlm: {len(fatbins)} CUDA binaries, {size:.1f} MB, for {' '.join(nvcc.architectures)}: "
                  f"{seconds:.0f} s of processor time, nvcc {nvcc.version} ({nvcc.path})", file=sys.stderr)  # fmt: skip
        elif not trouble:
            say(f"no CUDA binaries: {why}. The CUDA kernels will be compiled at their first use")

    def put(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        self.built.append(target)

    def record(self, trouble: str | None, nvcc: Nvcc | None, why: str, fatbins: list[Path], seconds: float) -> None:
        """What fastlm/cuda/_binaries.py goes by."""
        units = {}
        for unit in SOURCES.units(CSRC).values():
            architectures, ptx = SOURCES.chosen(unit.target, nvcc.architectures, nvcc.ptx) if nvcc else ([], [])
            units[unit.name] = {**SOURCES.digests(unit, CSRC), "architectures": architectures, "ptx": ptx}
        manifest = {
            "launchers": trouble or "built",
            "nvcc": nvcc.version if nvcc else None,
            "reason": why or None,
            "architectures": nvcc.architectures if nvcc else [],
            "ptx": nvcc.ptx if nvcc else [],
            "seconds": seconds,
            "files": {path.name: path.stat().st_size for path in fatbins},
            "units": units,
        }
        target = self.package / "cuda" / "binaries" / "manifest.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(manifest, indent=1) + "\n")
        self.built.append(target)

    def get_outputs(self) -> list[str]:
        return list(map(str, getattr(self, "built", [])))

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Editable installs load what was built from the source tree, where the sources are in csrc."""
        for path in self.built:
            name = path.relative_to(self.package)
            if self.package != ROOT / "fastlm" and name.parts[:2] != ("cuda", "csrc"):
                (ROOT / "fastlm" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, ROOT / "fastlm" / name)


packages = find_namespace_packages(include=["fastlm", "fastlm.*"], exclude=["fastlm.cuda.binaries"])
package_dir = {}
if not (ROOT / "fastlm" / "kernels").is_dir():  # a checkout that lost the symbolic link
    packages = [p for p in packages if not p.startswith("fastlm.kernels")]
    packages += ["fastlm.kernels", *(f"fastlm.kernels.{p}" for p in find_namespace_packages("kernels"))]
    package_dir = {"fastlm.kernels": "kernels"}

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"fastlm": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("fastlm._C", [])],  # marks the wheel as built for one platform
    cmdclass={"build_ext": NinjaBuild},
)
