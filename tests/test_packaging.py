"""What an install does without a compiler, without nvcc, with broken ones, and what the archives hold.

Most builds here use stand-ins for the compilers, which take the options and write empty files: what is asked is which
files are made, which are shipped and what is said. CUDA sources are cut down to one op.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fastlm.cuda import _sources

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files git would hand out, without what was built."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "runs", "binaries")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


def setup(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_no_compiler_still_installs_with_a_warning(checkout: Path) -> None:
    run = setup(checkout, "build", PATH=str(checkout), CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert "no working C++17 compiler" in run.stderr and "PyTorch reference" in run.stderr
    built = next((checkout / "build").glob("lib*"))
    assert (built / "fastlm" / "ops" / "layer_norm.py").exists()
    assert not list(built.rglob("_C*.so"))


def test_an_earlier_binary_is_not_shipped(checkout: Path) -> None:
    stale = checkout / "fastlm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"from another configuration")
    setup(checkout, "build_ext", "--inplace", PATH=str(checkout), CXX="no-such-compiler")
    assert not stale.exists()


def test_a_checkout_that_lost_the_link_installs_the_kernels(checkout: Path) -> None:
    (checkout / "fastlm" / "kernels").unlink()
    (checkout / "fastlm" / "kernels").write_text("../kernels")  # what an unzip without links leaves
    (checkout / "kernels" / "probe.py").write_text("")
    run = setup(checkout, "build", PATH=str(checkout), CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert list((checkout / "build").glob("lib*/fastlm/kernels/probe.py"))


def test_the_source_archive_is_complete(checkout: Path) -> None:
    run = setup(checkout, "sdist", "--dist-dir", "out")
    assert run.returncode == 0, run.stderr
    with tarfile.open(next((checkout / "out").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [p.relative_to(checkout) for p in (checkout / "csrc").rglob("*.*")]
    assert wanted and all(p.as_posix() in names for p in wanted)
    assert {"setup.py", "pyproject.toml", "Makefile", "fastlm/py.typed"} <= names


# --- CUDA ------------------------------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import sys
arguments = " ".join(sys.argv[1:])
{first}
if "-MF" in sys.argv:
    open(sys.argv[sys.argv.index("-MF") + 1], "w").write("out:")
open(sys.argv[sys.argv.index("-o") + 1], "w").write("made of " + arguments)
"""
NVCC = """
if arguments == "--version":
    sys.exit(print("Cuda compilation tools, release {release}, V{release}.88"))
if arguments == "--list-gpu-code":
    sys.exit(print("{known}"))
{fault}
"""
MODERN = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"


def stand_in(path: Path, first: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN.format(python=sys.executable, first=first))
    path.chmod(0o755)
    return path


def fake_nvcc(path: Path, release: str = "13.0", known: str = MODERN, fault: str = "") -> Path:
    return stand_in(path, NVCC.format(release=release, known=known.replace(" ", "\\n"), fault=fault))


@pytest.fixture
def cuda(checkout: Path) -> Path:
    """A checkout with one CUDA op, a stand-in for the C++ compiler, and no nvcc that it could find."""
    if sys.platform != "linux":
        pytest.skip("the CUDA kernels are for Linux")
    for pattern in ("*.cu", "*.cpp"):
        for path in (checkout / "csrc" / "cuda").glob(pattern):
            if path.stem not in ("gelu", "launch", "driver"):
                path.unlink()
    text = (checkout / "setup.py").read_text()
    assert "/usr/local/cuda/bin/nvcc" in text and '"nvidia"' in text
    text = text.replace("/usr/local/cuda/bin/nvcc", "/nowhere/nvcc").replace('"nvidia"', '"nowhere"')
    (checkout / "setup.py").write_text(text)
    stand_in(checkout / "bin" / "c++")
    return checkout


def install(cuda: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTLM_CUDA_ARCHS"):
        environment.setdefault(name, os.devnull if name != "FASTLM_CUDA_ARCHS" else " ".join(("80", "90a", "120+PTX")))
    return setup(cuda, *(command or ("build",)), PATH=str(cuda / "bin"), CXX="c++", **environment)


def package(cuda: Path) -> Path:
    return next((cuda / "build").glob("lib*")) / "fastlm"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cuda" / "binaries" / "manifest.json").read_text())
    return found


def binaries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cuda" / "binaries").glob("*") if path.name != "manifest.json"}


def extensions(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob("*.so")}


ALL = {f"gelu.{dtype}.fatbin" for dtype in _sources.DTYPES}


def test_without_nvcc_the_launchers_and_the_sources_are_there(cuda: Path) -> None:
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    built = package(cuda)
    assert extensions(built) == {"_C", "_cuda"} and not binaries(built)
    assert "no CUDA binaries: no nvcc in CUDA_HOME" in run.stderr and "compiled at their first use" in run.stderr
    found = manifest(built)
    assert found["launchers"] == "built" and found["nvcc"] is None and "no nvcc in" in found["reason"]
    for path in built.glob("*.so"):
        path.unlink()  # the stand-in's cannot be loaded
    code = (
        "from fastlm.cuda import _sources as s; root = s.folder(); print(root, s.digests(s.units(root)['gelu'], root))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=built.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] == str(built / "cuda" / "csrc")
    unit = found["units"]["gelu"]
    assert unit["kernel"] in run.stdout and unit["interface"] in run.stdout


def test_nvcc_on_the_path(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    assert binaries(package(cuda)) == ALL and extensions(package(cuda)) == {"_C", "_cuda"}
    assert "fastlm: 3 CUDA binaries" in run.stderr and "s of processor time, nvcc 13.0.88" in run.stderr
    found = manifest(package(cuda))
    assert found["architectures"] == ["80", "90a", "120"] and found["ptx"] == ["120"] and found["nvcc"] == "13.0.88"
    assert set(found["files"]) == ALL
    made = (package(cuda) / "cuda" / "binaries" / "gelu.bfloat16.fatbin").read_text()
    for part in ("-DFASTLM_DTYPE=1", "arch=compute_90a,code=sm_90a", "arch=compute_120,code=compute_120",
                 "-Werror all-warnings", "-compress-all"):  # fmt: skip
        assert part in made


def test_a_unit_for_each_head_dimension_on_the_chips_that_run_it(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    for source in ("attention_ampere_forward", "attention_hopper_forward"):
        (cuda / "csrc" / "cuda" / f"{source}.cu").write_text("")
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    folder, found = package(cuda) / "cuda" / "binaries", manifest(package(cuda))["units"]
    assert {name.removesuffix(".bfloat16.fatbin") for name in binaries(package(cuda)) if "bfloat16" in name} == {*found}
    ampere, hopper = ("attention_ampere_forward_96", "attention_hopper_forward_128")
    assert not (folder / f"{ampere}.float32.fatbin").exists() and (folder / f"{hopper}.float16.fatbin").exists()
    made = (folder / f"{ampere}.float16.fatbin").read_text()
    assert "-DFASTLM_DTYPE=2 -DFASTLM_HEAD_DIM=96" in made
    codes = {unit: re.findall(r"code=(\w+)", (folder / f"{unit}.bfloat16.fatbin").read_text()) for unit in found}
    assert codes[ampere] == ["sm_80", "sm_90a", "compute_80"] and codes[hopper] == ["sm_90a"]
    assert (found[ampere]["architectures"], found[ampere]["ptx"]) == (["80", "90a"], ["80"])
    assert codes["gelu"] == ["sm_80", "sm_90a", "sm_120", "compute_120"]
    run = install(cuda, FASTLM_CUDA_ARCHS="89")
    assert run.returncode == 0, run.stderr
    assert not any("hopper" in name for name in binaries(package(cuda)))
    assert manifest(package(cuda))["units"][hopper]["architectures"] == []


def test_an_nvcc_in_cuda_home_comes_first(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc", release="12.8")
    fake_nvcc(cuda / "my toolkit" / "bin" / "nvcc", release="13.1")
    run = install(cuda, CUDA_HOME=str(cuda / "my toolkit"))
    assert run.returncode == 0, run.stderr
    assert manifest(package(cuda))["nvcc"] == "13.1.88" and binaries(package(cuda)) == ALL
    # Another nvcc makes other binaries: none of the first's are taken over.
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    assert manifest(package(cuda))["nvcc"] == "12.8.88" and "my toolkit" not in run.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fault": "sys.exit('no host compiler')"}, "cannot compile an empty kernel: no host compiler"),
        ({"release": "11.8"}, "is version 11.8.88, below 12.0"),
        ({"known": "sm_70"}, "knows none of 80, 90a, 120"),
    ],
)
def test_an_nvcc_that_is_of_no_use_counts_as_none(options: dict[str, str], said: str, cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc", **options)
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    assert said in run.stderr and said in manifest(package(cuda))["reason"]
    assert extensions(package(cuda)) == {"_C", "_cuda"} and not binaries(package(cuda))


def test_something_else_that_is_called_nvcc(cuda: Path) -> None:
    (cuda / "bin" / "nvcc").write_text("no program")
    (cuda / "bin" / "nvcc").chmod(0o755)
    run = install(cuda)
    assert run.returncode == 0 and "nvcc does not run" in manifest(package(cuda))["reason"], run.stderr


def test_an_old_nvcc_leaves_out_what_it_does_not_know(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc", release="12.4", known="sm_80 sm_90")
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    assert "nvcc 12.4.88 does not know sm_120: left out" in run.stderr
    found = manifest(package(cuda))
    assert found["architectures"] == ["80", "90a"] and found["ptx"] == ["90"]


@pytest.mark.parametrize(
    ("asked", "architectures", "ptx"),
    [("90a", ["90a"], []), ("80;86,sm_90a+PTX", ["80", "86", "90a"], ["90"]), ("none", [], []), ("", [], [])],
)
def test_a_narrower_choice(asked: str, architectures: list[str], ptx: list[str], cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    run = install(cuda, FASTLM_CUDA_ARCHS=asked)
    assert run.returncode == 0, run.stderr
    found = manifest(package(cuda))
    assert found["architectures"] == architectures and found["ptx"] == ptx
    assert binaries(package(cuda)) == (ALL if architectures else set())
    assert architectures or found["reason"] == "FASTLM_CUDA_ARCHS asks for none"


def test_a_choice_that_is_none(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    run = install(cuda, FASTLM_CUDA_ARCHS="hopper")
    assert run.returncode != 0 and "FASTLM_CUDA_ARCHS must be 'none' or a list like '80 90a 120+PTX'" in run.stderr


def test_sources_that_a_working_nvcc_refuses_are_an_error(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc", fault="if 'gelu' in arguments: sys.exit('a warning')")
    run = install(cuda)
    assert run.returncode != 0
    assert "13.0.88 failed to compile the CUDA kernels" in run.stderr and "FASTLM_CUDA_ARCHS=none" in run.stderr


def test_trouble_with_the_launchers_leaves_the_cpu_kernels(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    stand_in(cuda / "bin" / "c++", "if 'driver.cpp' in arguments: sys.exit('no dlopen')")
    run = install(cuda)
    assert run.returncode == 0, run.stderr
    assert extensions(package(cuda)) == {"_C"} and "compiling fastlm._cuda with c++ failed" in run.stderr
    assert "compiling fastlm._cuda with c++ failed when fastlm was installed" in manifest(package(cuda))["launchers"]


def test_trouble_with_the_cpu_kernels_is_an_error(cuda: Path) -> None:
    stand_in(cuda / "bin" / "c++", "if 'rope.cpp' in arguments: sys.exit('no intrinsics')")
    run = install(cuda)
    assert run.returncode != 0 and "compiling fastlm._C failed" in run.stderr


def test_no_binary_of_an_earlier_configuration_is_shipped(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    assert install(cuda).returncode == 0 and install(cuda, "build_ext", "--inplace").returncode == 0
    for folder in (package(cuda), cuda / "fastlm"):
        assert binaries(folder) == ALL and extensions(folder) == {"_C", "_cuda"}
        (folder / "cuda" / "binaries" / "gone.float32.fatbin").write_text("of an op that is gone")
    assert not (cuda / "fastlm" / "cuda" / "csrc").exists()  # the checkout has its own
    (package(cuda) / "cuda" / "csrc" / "cuda" / "gone.cu").write_text("of an op that is gone")
    stand_in(cuda / "bin" / "c++", "if 'driver.cpp' in arguments: sys.exit('no dlopen')")
    (cuda / "csrc" / "cuda" / "driver.cpp").write_text("// changed")
    run = install(cuda, FASTLM_CUDA_ARCHS="none")
    assert run.returncode == 0, run.stderr
    for folder in (package(cuda), cuda / "fastlm"):
        assert not binaries(folder) and "_cuda" not in extensions(folder)
    assert not (package(cuda) / "cuda" / "csrc" / "cuda" / "gone.cu").exists()


def test_the_wheel_holds_binaries_and_sources(cuda: Path) -> None:
    fake_nvcc(cuda / "bin" / "nvcc")
    run = install(cuda, "bdist_wheel", "--dist-dir", "out")
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(next((cuda / "out").glob("*.whl"))) as archive:
        names = set(archive.namelist())
    sources = {name for name in names if name.startswith("fastlm/cuda/csrc/")}
    wanted = {f"fastlm/cuda/csrc/{name}" for name in _sources.files(cuda / "csrc")}
    assert sources == wanted and {f"fastlm/cuda/csrc/{name}" for name in ("common.h", "cuda/gelu.cu")} <= sources
    held = {f"fastlm/cuda/binaries/{name}" for name in {*ALL, "manifest.json"}}
    assert held <= names and f"fastlm/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}" in names


NVCC_HERE = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC_HERE is None, reason="no nvcc on PATH or in /usr/local/cuda")
def test_a_real_nvcc_behind_a_wrapper_script(cuda: Path) -> None:
    wrapper = cuda / "toolkit" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nPATH="{os.environ["PATH"]}" exec "{NVCC_HERE}" "$@"\n')
    wrapper.chmod(0o755)
    run = install(cuda, CUDA_HOME=str(cuda / "toolkit"), FASTLM_CUDA_ARCHS="80 90a+PTX")
    assert run.returncode == 0, run.stdout + run.stderr
    assert binaries(package(cuda)) == ALL and manifest(package(cuda))["seconds"] > 1
    for name in ALL:
        content = (package(cuda) / "cuda" / "binaries" / name).read_bytes()
        assert content[:4] == b"\x50\xed\x55\xba"  # a fatbin


def test_what_is_installed_here_is_small() -> None:
    folder = ROOT / "fastlm"
    made = [*folder.glob("_*.so"), *(folder / "cuda" / "binaries").glob("*")]
    if not made:
        pytest.skip("fastlm was not built in this folder")
    assert sum(path.stat().st_size for path in made) < 30e6
