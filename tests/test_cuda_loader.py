"""Where the CUDA binaries come from: package, cache, NVRTC. Real compiles where NVRTC is installed; never a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm import cuda
from fastlm.cuda import _binaries, _nvrtc, _sources

ROOT = Path(__file__).resolve().parent.parent
KERNEL = 'extern "C" __global__ void probe(float* x) { x[threadIdx.x] = '
PROBE = _sources.Unit("probe", "cuda/probe.cu")
needs_nvrtc = pytest.mark.skipif(_nvrtc.find()[0] is None, reason=_nvrtc.find()[1])
CACHES = (_binaries.manifest, _binaries._is_packaged, _binaries._warn_once, _nvrtc.find)


def forget() -> None:
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An op of our own, a package without binaries, an empty cache."""
    root = tmp_path / "csrc"
    (root / "cuda").mkdir(parents=True)
    (root / "common.h").write_text("#pragma once\n")
    (root / "cuda" / "probe.h").write_text('#pragma once\n#include "common.h"\nstruct ProbeArguments { float* x; };\n')
    (root / "cuda" / "value.cuh").write_text("constexpr float VALUE = FASTLM_DTYPE;\n")
    (root / "cuda" / "other.h").write_text("\n")
    (root / "cuda" / "probe.cu").write_text(
        f'#include "cuda/probe.h"\n#  include "cuda/value.cuh"\n{KERNEL}VALUE; }}\n'
    )
    monkeypatch.setattr(_sources, "folder", lambda: root)
    monkeypatch.setattr(_binaries, "PACKAGED", tmp_path / "binaries")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield root
    forget()


def package(folder: Path, csrc: Path, architectures: str = "80 90a 120", ptx: str = "120", **other: Any) -> None:
    """What the build leaves."""
    folder.mkdir(exist_ok=True)
    units = {}
    for unit in _sources.units(csrc).values():
        made, texts = _sources.chosen(unit.target, architectures.split(), ptx.split())
        units[unit.name] = {**_sources.digests(unit, csrc), "architectures": made, "ptx": texts}
        for dtype in unit.target.dtypes if made else ():
            (folder / f"{unit.name}.{dtype}.fatbin").write_bytes(b"packaged " + dtype.encode())
    manifest = {
        "launchers": "built", "nvcc": "13.0.88", "reason": None, "architectures": architectures.split(),
        "ptx": ptx.split(), "seconds": 1.0, "units": units,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({**manifest, **other}))
    forget()


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "fastlm").glob("*"))


class Counted:
    """Stands for NVRTC where what it makes does not matter."""

    path, version, architectures, size = "counted", (13, 0), [80, 90, 100, 120], 1

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def compile(self, sources: dict[str, str], options: list[str]) -> tuple[bytes, str]:
        self.calls.append(options)
        return json.dumps([sources, options]).encode(), ""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    compiler = Counted()
    monkeypatch.setattr(_nvrtc, "find", lambda: (compiler, ""))
    return compiler


def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "find", lambda: (None, "NVRTC was not found"))


# --- which binary serves which GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "ptx", "arch", "served"),
    [
        ("80", "", 80, True),
        ("80", "", 86, True),  # the same major number, a higher minor one
        ("86", "", 80, False),
        ("80", "", 90, False),
        ("90a", "", 90, True),
        ("90", "", 90, True),
        ("100", "", 103, True),
        ("100a", "", 103, False),  # that very chip
        ("100", "", 120, False),
        ("80 90a", "90", 120, True),  # PTX: everything from there on
        ("80 90a", "90", 86, True),
        ("90a", "90", 86, False),
        ("", "", 90, False),
    ],
)
def test_what_serves_a_gpu(architectures: str, ptx: str, arch: int, served: bool) -> None:
    assert _sources.serves(architectures.split(), ptx.split(), arch) is served


@pytest.mark.parametrize(
    ("arch", "supported", "target"),
    [
        (80, [80, 90], "80"),
        (90, [80, 90, 100], "90a"),
        (86, [80, 90], "80"),  # an older binary of the same major number
        (103, [90, 100, 120], "100"),
        (120, [80, 90], "90ptx"),
        (121, [90, 100, 120], "120"),
    ],
)
def test_what_is_compiled_for_a_gpu(arch: int, supported: list[int], target: str) -> None:
    assert _binaries.target(_sources.Target(), arch, supported) == target


def test_a_gpu_older_than_the_compiler_knows() -> None:
    with pytest.raises(ImportError, match="75 and newer, the GPU is 70"):
        _binaries.target(_sources.Target(), 70, [75, 80])


# --- units -----------------------------------------------------------------------------------------------------------

FORWARD, HOPPER = "attention_ampere_forward", "attention_hopper_forward"


@pytest.fixture
def attention(csrc: Path) -> Path:
    """Sources that are compiled once for each head dimension."""
    (csrc / "cuda" / "attention.h").write_text("#pragma once\nstruct AttentionArguments { float* x; };\n")
    (csrc / "cuda" / "attention_ampere.h").write_text('#include "cuda/attention.h"\n')
    for name in (FORWARD, HOPPER):
        text = f'#include "cuda/attention_ampere.h"\n#include "cuda/value.cuh"\n{KERNEL}FASTLM_HEAD_DIM + VALUE; }}\n'
        (csrc / "cuda" / f"{name}.cu").write_text(text)
    return csrc


def test_a_source_without_head_dimensions_is_one_unit(csrc: Path) -> None:
    assert _sources.units(csrc) == {"probe": PROBE}
    assert PROBE.target.dtypes == ("float32", "bfloat16", "float16")


def test_a_unit_for_each_head_dimension(attention: Path) -> None:
    units = _sources.units(attention)
    widths = {name: [int(n.rpartition("_")[2]) for n in units if n.startswith(name)] for name in (FORWARD, HOPPER)}
    assert widths == {FORWARD: [32, 64, 96, 128, 192, 256], HOPPER: [64, 128, 256]}
    unit = units[f"{FORWARD}_64"]
    assert (unit.source, unit.flags) == (f"cuda/{FORWARD}.cu", ("-DFASTLM_HEAD_DIM=64",))
    assert unit.target.dtypes == ("bfloat16", "float16")


def test_the_widths_are_those_that_the_launcher_knows() -> None:
    text = (ROOT / "csrc" / "cuda" / "attention.h").read_text()
    (known,) = re.findall(r"HEAD_DIMS\[\] = \{([\d, ]+)\}", text)
    head_dims = tuple(map(int, known.split(",")))
    for source, (widths, target) in _sources.PER_HEAD_DIM.items():
        assert set(widths) <= set(head_dims) and (widths == head_dims or not target.ptx), source


@pytest.mark.parametrize(
    ("asked", "ptx", "ampere", "hopper"),
    [
        ("80 86 89 90a 100 120", "120", "80 90a +80", "90a"),
        ("80", "", "80", ""),
        ("90a", "", "90a", "90a"),
        ("90a", "90", "90a +80", "90a"),
        ("86", "", "80", ""),  # which runs there
        ("89 90a", "", "80 90a", "90a"),
        ("90", "", "90a", "90a"),
        ("120", "120", "120 +120", ""),
        ("90a 120", "", "90a +80", "90a"),
    ],
)
def test_what_is_made_of_a_unit(asked: str, ptx: str, ampere: str, hopper: str) -> None:
    for target, wanted in ((_sources.AMPERE, ampere), (_sources.HOPPER, hopper), (_sources.Target(), None)):
        binaries, texts = _sources.chosen(target, asked.split(), ptx.split())
        if wanted is None:
            assert (binaries, texts) == ([a for a in asked.split() if a != "89" or "86" not in asked], ptx.split())
        else:
            assert " ".join([*binaries, *(f"+{each}" for each in texts)]) == wanted
        for name in map(_sources.number, asked.split() if binaries else []):
            assert _sources.serves(binaries, texts, name) is _sources.runs(target, name)


def test_architectures_share_ptx_where_the_source_asks_for_none_of_them(attention: Path) -> None:
    units, asked = _sources.units(attention), ["80", "86", "90a", "100", "120"]
    own = [("80", "sm_80"), ("90a", "sm_90a"), ("100", "sm_100"), ("120", "sm_120"), ("120", "compute_120")]

    def codes(name: str, asked: list[str], ptx: list[str]) -> list[tuple[str, str]]:
        return _sources.codes(units[name], *_sources.chosen(units[name].target, asked, ptx), attention)

    assert codes("probe", asked, ["120"]) == [
        ("80", "sm_80"), ("80", "sm_86"), ("90a", "sm_90a"), ("100", "sm_100"), ("100", "sm_120"),
        ("100", "compute_100"),
    ]  # fmt: skip
    assert codes("probe", ["86", "120"], []) == [("86", "sm_86"), ("120", "sm_120")]  # 80 and 100 are not asked for
    assert codes(f"{FORWARD}_64", asked, ["120"]) == [("80", "sm_80"), ("80", "sm_90a"), ("80", "compute_80")]
    assert codes(f"{HOPPER}_64", asked, ["120"]) == [("90a", "sm_90a")]
    (attention / "cuda" / "value.cuh").write_text("#if __CUDA_ARCH__ == 860\n#endif\n")
    assert codes("probe", ["80", "90a", "100", "120"], ["120"]) == own


def test_a_unit_is_loaded_by_its_name(tmp_path: Path, attention: Path, counted: Counted) -> None:
    package(tmp_path / "binaries", attention, "80 86 90a 120", "120")
    assert _binaries.load(f"{FORWARD}_64", "bfloat16", 80) == b"packaged bfloat16"
    assert _binaries.load(f"{FORWARD}_64", "float16", 86) == b"packaged float16"
    assert _binaries.load(f"{FORWARD}_64", "float16", 120) == b"packaged float16"  # from PTX
    assert _binaries.load(f"{HOPPER}_128", "float16", 90) == b"packaged float16"
    assert not counted.calls


def test_a_unit_is_compiled_alone_for_the_gpu(tmp_path: Path, attention: Path, counted: Counted) -> None:
    sources, options = json.loads(_binaries.load(f"{FORWARD}_96", "float16", 90))
    assert "--gpu-architecture=sm_90a" in options and "-DFASTLM_HEAD_DIM=96" in options
    assert next(iter(sources)) == f"cuda/{FORWARD}.cu"
    _, options = json.loads(_binaries.load(f"{FORWARD}_128", "float16", 120))
    assert len(counted.calls) == 2  # of the same sources
    assert "--gpu-architecture=compute_80" in options  # PTX, as in the package
    assert [path.name.split(".")[0] for path in cached(tmp_path)] == [f"{FORWARD}_128", f"{FORWARD}_96"]


@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    [(f"{HOPPER}_64", "bfloat16", 80), (f"{HOPPER}_64", "bfloat16", 100), (f"{HOPPER}_32", "bfloat16", 90),
     (f"{FORWARD}_64", "float32", 80), (FORWARD, "bfloat16", 80)],
)  # fmt: skip
def test_a_unit_that_there_cannot_be(name: str, dtype: str, arch: int, attention: Path, counted: Counted) -> None:
    with pytest.raises(ImportError, match=f"there is no {name} in {dtype} for sm_{arch}"):
        _binaries.load(name, dtype, arch)
    assert not counted.calls


def test_a_unit_that_there_cannot_be_is_not_missing(
    tmp_path: Path, attention: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path / "binaries", attention, "80", "")
    no_nvrtc(monkeypatch)
    assert _binaries.missing([80, 86]) is None
    assert "sm_90 are in the package" in str(_binaries.missing([80, 90]))


def test_the_headers_of_a_unit_are_its_interface(tmp_path: Path, attention: Path, counted: Counted) -> None:
    package(tmp_path / "binaries", attention)
    path = attention / "cuda" / "attention.h"
    path.write_text(path.read_text() + "// changed\n")
    forget()
    for name in (f"{FORWARD}_64", f"{HOPPER}_64"):
        with pytest.raises(RuntimeError, match=r"headers of csrc/cuda/attention_\w+\.cu"):
            _binaries.load(name, "bfloat16", 90)
    assert _binaries.load("probe", "bfloat16", 90) == b"packaged bfloat16"


# --- the package -----------------------------------------------------------------------------------------------------


def test_the_package_is_taken_where_it_serves(tmp_path: Path, csrc: Path, counted: Counted) -> None:
    package(tmp_path / "binaries", csrc)
    assert _binaries.load("probe", "bfloat16", 86) == b"packaged bfloat16"
    assert _binaries.load("probe", "float16", 90) == b"packaged float16"
    assert _binaries.load("probe", "float16", 121) == b"packaged float16"
    assert not counted.calls and not cached(tmp_path)
    _binaries.load("probe", "float32", 100)  # served by none of them
    assert counted.calls == [_binaries.options(PROBE, "float32", "100")]


def test_binaries_of_other_sources_are_passed_over(tmp_path: Path, csrc: Path, counted: Counted) -> None:
    package(tmp_path / "binaries", csrc)
    (csrc / "cuda" / "value.cuh").write_text("constexpr float VALUE = 2;\n")
    forget()
    assert b"VALUE = 2" in _binaries.load("probe", "bfloat16", 80)


def test_launchers_never_meet_kernels_that_take_another_struct(tmp_path: Path, csrc: Path, counted: Counted) -> None:
    package(tmp_path / "binaries", csrc)
    (csrc / "cuda" / "probe.h").write_text("struct ProbeArguments { float* x; int n; };\n")
    forget()
    with pytest.raises(RuntimeError, match=r"of csrc/cuda/probe\.cu are not what fastlm\._cuda was"):
        _binaries.load("probe", "bfloat16", 80)
    assert not counted.calls


@pytest.mark.parametrize(("torch_cuda", "packaged"), [("13.0", True), ("12.8", False), (None, True)])
def test_a_binary_that_may_be_too_new_for_the_driver(
    torch_cuda: str | None, packaged: bool, tmp_path: Path, csrc: Path, counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    package(tmp_path / "binaries", csrc)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert (_binaries.load("probe", "bfloat16", 80) == b"packaged bfloat16") is packaged
    no_nvrtc(monkeypatch)
    _binaries._is_packaged.cache_clear()
    assert _binaries.load("probe", "bfloat16", 80) == b"packaged bfloat16"  # better than nothing


# --- why neither -----------------------------------------------------------------------------------------------------


def test_missing(tmp_path: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_nvrtc(monkeypatch)
    reason = _binaries.missing([86, 90])
    assert reason is not None and "sm_86, sm_90" in reason and "NVRTC was not found" in reason
    package(tmp_path / "binaries", csrc, "", "", nvcc=None, reason="no nvcc in CUDA_HOME or PATH")
    assert "no nvcc in CUDA_HOME" in str(_binaries.missing([90]))
    with pytest.raises(ImportError, match="NVRTC was not found"):
        _binaries.load("probe", "bfloat16", 90)
    package(tmp_path / "binaries", csrc)
    assert _binaries.missing([80, 90, 121]) is None
    assert "sm_100 are in the package (they were made for 80, 90a, 120" in str(_binaries.missing([80, 100]))
    (csrc / "cuda" / "value.cuh").write_text("constexpr float VALUE = 2;\n")
    forget()
    no_nvrtc(monkeypatch)
    assert "or of other sources" in str(_binaries.missing([80]))


def test_a_compiler_is_enough(counted: Counted) -> None:
    assert _binaries.missing([80, 130]) is None


def test_why_the_launchers_are_not_there(tmp_path: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_extension", None)
        assert "was not installed from here" in str(cuda.missing())
        package(tmp_path / "binaries", csrc, launchers="compiling fastlm._cuda with g++ failed")
        assert "compiling fastlm._cuda with g++ failed" in str(cuda.missing())
        with pytest.raises(ImportError, match="failed"):
            cuda.extension()
        package(tmp_path / "binaries", csrc)
        assert "another than 3." in str(cuda.missing())


# --- the disk cache --------------------------------------------------------------------------------------------------


def test_compiled_once(tmp_path: Path, counted: Counted) -> None:
    first = _binaries.load("probe", "bfloat16", 90)
    assert _binaries.load("probe", "bfloat16", 90) == first
    assert len(counted.calls) == 1 and len(cached(tmp_path)) == 1
    assert cached(tmp_path)[0].name.startswith("probe.bfloat16.sm_90a.")


def test_the_key_depends_on_all_a_binary_depends_on(tmp_path: Path, csrc: Path, counted: Counted) -> None:
    def fresh(dtype: str = "bfloat16", arch: int = 90) -> bool:
        before = len(counted.calls)
        _binaries.load("probe", dtype, arch)
        return len(counted.calls) > before

    assert fresh() and fresh("float16") and fresh(arch=80) and not fresh()
    (csrc / "cuda" / "other.h").write_text("// the op does not include it\n")
    assert not fresh()
    for name in ("common.h", "cuda/probe.h", "cuda/value.cuh", "cuda/probe.cu"):
        (csrc / name).write_text((csrc / name).read_text() + "// changed\n")
        assert fresh() and not fresh(), name
    counted.version = (13, 1)
    assert fresh()
    counted.size = 2  # another build of the same version
    assert fresh() and not fresh()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: b"\0" * len(content),
    ],
    ids=["empty", "less than a hash", "cut", "a bit", "zeros"],
)
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path, counted: Counted) -> None:
    good = _binaries.load("probe", "bfloat16", 90)
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert _binaries.load("probe", "bfloat16", 90) == good
    assert len(counted.calls) == 2 and path.read_bytes() == whole and cached(tmp_path) == [path]


@pytest.mark.parametrize("blocked", ["cache", "file"])
def test_a_cache_that_cannot_be_written_warns_once(blocked: str, tmp_path: Path, counted: Counted) -> None:
    if blocked == "cache":
        (tmp_path / "cache").write_text("a file where the folder should be")
    else:
        _binaries.load("probe", "bfloat16", 90)
        (path,) = cached(tmp_path)
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*fastlm and are compiled again") as caught:
        first = _binaries.load("probe", "bfloat16", 90)
        assert _binaries.load("probe", "bfloat16", 90) == first
    assert len(caught) == 1
    if blocked == "file":
        assert cached(tmp_path) == [path]  # nothing half-written stays


def test_without_a_home(tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _binaries.cache_folder() == Path.home() / ".cache" / "fastlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert _binaries.cache_folder() == Path.home() / ".cache" / "fastlm"
    monkeypatch.setattr(Path, "home", nowhere)
    assert _binaries.cache_folder() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _binaries.load("probe", "bfloat16", 90) == _binaries.load("probe", "bfloat16", 90)
    assert len(counted.calls) == 2 and _binaries.describe()["cache"] is None


# --- finding NVRTC ---------------------------------------------------------------------------------------------------


def test_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("cu13", "cuda_nvrtc", "toolkit", "absent")]
    for folder, names in zip(folders, ("13", "12", "13"), strict=False):
        folder.mkdir()
        for name in (f"libnvrtc.so.{names}", f"libnvrtc.alt.so.{names}", f"libnvrtc-builtins.so.{names}.0"):
            (folder / name).write_text("no library")
    (folders[2] / "libnvrtc.so").symlink_to("libnvrtc.so.13")
    monkeypatch.setattr(_nvrtc, "_folders", lambda: iter(map(str, folders)))
    thirteen, twelve, toolkit = (
        str(folder / f"libnvrtc.so.{major}") for folder, major in zip(folders, (13, 12, 13), strict=False)
    )
    for version, expected in (
        (None, [thirteen, twelve, toolkit]),
        ("13.0", [thirteen, toolkit, twelve]),
        ("12.8", [twelve, thirteen, toolkit]),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert _nvrtc.candidates() == expected
    found, why = _nvrtc.find()
    assert found is None and all(path.rpartition("/")[0] in why for path in expected)


def test_none_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "_folders", lambda: iter(()))
    assert _nvrtc.find() == (None, "NVRTC was not found (pip install nvidia-cuda-nvrtc brings it)")


@needs_nvrtc
def test_a_library_that_cannot_be_loaded_leaves_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvrtc.so.13").write_text("no library")
    real = list(_nvrtc._folders())
    monkeypatch.setattr(_nvrtc, "_folders", lambda: iter([str(tmp_path), *real]))
    found, _ = _nvrtc.find()
    assert found is not None and not found.path.startswith(str(tmp_path))


@needs_nvrtc
def test_a_compiler_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "OLDEST", (99, 0))
    found, why = _nvrtc.find()
    assert found is None and "below 99.0" in why


# --- with the real NVRTC ---------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_compiles_and_caches(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = _binaries.load("probe", "bfloat16", arch)
    assert binary[:4] == b"\x7fELF" and b"probe" in binary
    (path,) = cached(tmp_path)
    assert path.read_bytes() == hashlib.sha256(binary).digest() + binary
    monkeypatch.setattr(_nvrtc.Compiler, "compile", None)  # must not be needed again
    assert _binaries.load("probe", "bfloat16", arch) == binary


@needs_nvrtc
def test_ptx_for_a_gpu_newer_than_the_compiler(tmp_path: Path) -> None:
    newest = _nvrtc.find()[0].architectures[-1]  # type: ignore[union-attr]
    text = _binaries.load("probe", "bfloat16", newest // 10 * 10 + 10)
    assert f".target sm_{newest}".encode() in text and b".entry probe" in text


@needs_nvrtc
def test_an_error_brings_the_log(tmp_path: Path, csrc: Path) -> None:
    (csrc / "cuda" / "probe.cu").write_text(f"{KERNEL}undefined_value; }}\n")
    with pytest.raises(_nvrtc.CompileError, match=r"(?s)cuda/probe\.cu.*sm_90a.*undefined_value"):
        _binaries.load("probe", "bfloat16", 90)
    assert not cached(tmp_path)
    (csrc / "cuda" / "probe.cu").write_text('#include "cuda/nowhere.h"\n')
    with pytest.raises(_nvrtc.CompileError, match=r"nowhere\.h"):
        _binaries.compile("probe", "bfloat16", "80")


@needs_nvrtc
def test_the_sources_compile_from_memory_alone() -> None:
    """One unit of each and one architecture here: bench/cuda_binaries.py does them all."""
    compiler, _ = _nvrtc.find()
    assert compiler is not None
    narrowest = {unit.source: unit for unit in reversed(_sources.units(ROOT / "csrc").values())}
    for unit in narrowest.values():
        sources = _sources.closure(unit.source, ROOT / "csrc")
        binary, log = compiler.compile(sources, _binaries.options(unit, "bfloat16", "90a"))
        assert binary[:4] == b"\x7fELF" and not log, log


@needs_nvrtc
@pytest.mark.parametrize(
    "name",
    ["softmax", *(u.name for u in _sources.units(ROOT / "csrc").values() if u.target.front and u.name.endswith("_32"))],
)
def test_ptx_is_shared_where_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what bench/cuda_binaries.py judges, compiled for each architecture, is what the package has."""
    monkeypatch.setattr(_sources, "folder", lambda: ROOT / "csrc")
    unit = _binaries._units()[name]
    made, _ = _sources.chosen(unit.target, [*_sources.ARCHITECTURES], [])
    for front, code in _sources.codes(unit, made, [], ROOT / "csrc"):
        if (arch := code.removeprefix("sm_")) != front:
            texts = [_binaries.compile(name, "bfloat16", f"{each}ptx").decode() for each in (front, arch)]
            assert re.sub(r"\.target sm_\d+a?", "", texts[0]) == re.sub(r"\.target sm_\d+a?", "", texts[1]), code


@needs_nvrtc
def test_many_threads(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(_binaries.load("probe", "float16", (80, 90)[i % 2])))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 2 and len(cached(tmp_path)) == 2


@needs_nvrtc
def test_two_processes(tmp_path: Path) -> None:
    """At once, with the sources of the checkout."""
    code = "from fastlm.cuda import _binaries as b; print(len(b._cached(b._units()['gelu'], 'bfloat16', '80')))"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0] and len(said) == 1


def test_describe_has_types_that_json_has() -> None:
    assert json.loads(json.dumps(_binaries.describe())) == _binaries.describe()
