"""Every CUDA kernel compiles for every chip, and what comes out keeps the rules, without a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import binaries, cuda_binaries
from fastlm.cuda import _nvrtc, _sources
from fastlm.kernels import _platform
from tests import emulation

if _platform.INTERPRETED or emulation.INSTALLED:
    pytest.skip("nothing of it runs another way in this run", allow_module_level=True)
if cuda_binaries.missing():
    pytest.skip(str(cuda_binaries.missing()), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gate() -> dict[str, Any]:
    """What the gate says of every kernel."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.cuda_binaries", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


def test_no_kernel_breaks_a_rule(gate: dict[str, Any]) -> None:
    assert gate["rows"]
    assert not gate["complaints"], "\n".join(gate["complaints"])


def test_figures_are_the_committed_ones(gate: dict[str, Any]) -> None:
    if not gate["known"]:
        pytest.skip(f"no figures of {gate['compiler']} are committed; the rules held")
    hint = "\nlook at them, then: python -m bench.cuda_binaries <op> --save"
    assert not gate["differences"], "\n".join(gate["differences"]) + hint


# --- the gate itself -------------------------------------------------------------------------------------------------

GOOD = {
    "registers": 64, "most": 64, "threads": 256, "local": 0, "shared": 0, "spills": 0, "loads": {"16": 2},
    "stores": {"2": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, []),
        ({"error": "expected a ';'"}, ["does not compile: expected a ';'"]),
        ({"spills": 3, "local": 8}, ["3 spilling instructions, 8 bytes of local memory"]),
        ({"local": 8}, ["0 spilling instructions, 8 bytes"]),
        ({"registers": 72}, ["72 registers for 256 threads, 64 allowed"]),
        ({"registers": 128, "most": 128, "threads": 1024}, ["128 registers for 1024 threads"]),
        ({"loads": {"8": 1, "2": 3}}, ["no access of 16 bytes"]),
        ({"loads": {}, "stores": {"32": 1}}, []),
        ({"atomics": 2}, []),
        ({"atomics": 2, "float atomics": 1}, ["atomics on floats"]),
    ],
)
def test_what_breaks_a_rule(figures: dict[str, Any], said: list[str]) -> None:
    found = cuda_binaries.complaints("op", "kernel_1", GOOD | figures)
    assert len(found) == len(said)
    for text, part in zip(found, said, strict=True):
        assert part in text


def test_an_instance_that_may_be_narrow_is_named_in_whole() -> None:
    narrow = GOOD | {"loads": {"2": 1}}
    assert not cuda_binaries.complaints("gelu", "gelu_forward_0", narrow)
    assert cuda_binaries.complaints("gelu", "gelu_forward_1", narrow)
    assert cuda_binaries.complaints("gelu", "gelu_forward_01", narrow)


def test_an_instance_that_may_add_floats_is_named_too() -> None:
    adding = GOOD | {"mma": 8, "LDGSTS": 4, "atomics": 2, "float atomics": 2}
    assert not cuda_binaries.complaints("attention_ampere_backward", "attention_ampere_backward_0", adding)
    (said,) = cuda_binaries.complaints("attention_ampere_forward", "attention_ampere_forward_0", adding)
    assert "IN_TURN does not name it" in said


def test_what_attention_must_have() -> None:
    assert cuda_binaries.complaints("attention_ampere_bias", "x", GOOD | {"mma": 8}) == ["no LDGSTS"]
    assert cuda_binaries.complaints("attention_hopper_forward", "x", GOOD) == ["no wgmma and no UTMALDG"]
    assert not cuda_binaries.complaints("attention_hopper_forward", "x", GOOD | {"wgmma": 8, "UTMALDG": 2})
    assert not cuda_binaries.complaints("attention", "x", GOOD)


def test_every_name_of_an_exception_is_an_instance_that_needs_it(gate: dict[str, Any]) -> None:
    assert not gate["unused"], f"NARROW or IN_TURN names what does not need it or is not there: {gate['unused']}"


def test_nvrtc_and_nvcc_of_one_version_make_the_same_instructions(tmp_path: Path) -> None:
    nvrtc, why = _nvrtc.find()
    if nvrtc is None or cuda_binaries.nvcc() is None:
        pytest.skip(why or "nvcc is not on PATH")
    said = subprocess.run([str(cuda_binaries.nvcc()), "--version"], capture_output=True, text=True).stdout
    if f"release {'.'.join(map(str, nvrtc.version))}," not in said:
        pytest.skip(f"NVRTC {nvrtc.version} and nvcc of another version")
    job = cuda_binaries.Job(cuda_binaries.UNITS["gelu"], "bfloat16", "sm_90a")
    code = []
    for compile in (cuda_binaries.with_nvrtc, cuda_binaries.with_nvcc):
        path = tmp_path / "kernel.cubin"
        path.write_bytes(compile(*job))
        text = binaries.code(path)
        code.append({name: re.sub(r"\.L_x_\d+", "label", body) for name, body in text.items()})
    assert len(code[0]) == 8 and code[0] == code[1]


ATOMICS = """
        /*0110*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0120*/              @!P0 ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5 ;
        /*0130*/                   REDG.E.ADD.BF16_V2.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0140*/                   ATOMG.E.ADD.F16x2.RN.STRONG.GPU PT, RZ, [R2], R5 ;
"""


def test_atomics_on_floats_are_told_from_others() -> None:
    assert {k: v for k, v in binaries.read_sass(ATOMICS).items() if v} == {"atomics": 4, "float atomics": 3}


TILES = """
#include <cstdio>
#include "cuda/attention_ampere.h"
#include "cuda/attention_hopper.h"
using namespace fastlm::cuda;
void say(const char* name, int width, AttentionTiles tiles) {
  for (int i = 0; i < tiles.count; ++i)
    std::printf("%s_%d %d %d %lld\\n", name, width, i, tiles.rows[i].general, (long long)tiles.rows[i].shared);
}
int main() {
  for (const int w : HEAD_DIMS) {
    say("attention_ampere_forward", w, ampere_forward(w));
    say("attention_ampere_backward", w, ampere_backward(w));
    say("attention_ampere_bias", w, ampere_bias(w));
  }
  for (const int w : HOPPER_HEAD_DIMS) {
    say("attention_hopper_forward", w, hopper_forward_tiles(w));
    say("attention_hopper_backward", w, hopper_backward_tiles(w));
  }
}
"""
SHARED = {"sm_86": 99 << 10, "sm_90a": 227 << 10}
"""Bytes that a block can have; sm_89 and sm_120 are as sm_86, sm_80 has more. Launchers take a tile that fits."""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[bool, int]]]:
    """By unit, of each variant whether it is general and its dynamic shared memory."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    program = tmp_path_factory.mktemp("tiles") / "tiles"
    program.with_suffix(".cpp").write_text(TILES)
    command = ["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-o", program, program.with_suffix(".cpp")]
    subprocess.run(command, check=True)
    found: dict[str, list[tuple[bool, int]]] = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        unit, variant, general, shared = line.split()
        found.setdefault(unit, []).append((general == "1", int(shared)))
        assert int(variant) == len(found[unit]) - 1
    return found


def test_shared_memory_of_attention_is_within_the_chips(tiles: dict[str, list[tuple[bool, int]]]) -> None:
    """Every tile runs on some chip that its unit is for; on the smallest there is one of each kind."""
    assert {*tiles} == {
        name for name, unit in cuda_binaries.UNITS.items() if "-DFASTLM_HEAD_DIM" in "".join(unit.flags)
    }
    for unit, each in tiles.items():
        assert max(shared for _, shared in each) <= SHARED["sm_90a"], unit
        if "ampere" in unit:
            for kind in {general for general, _ in each}:
                assert min(shared for general, shared in each if general is kind) <= SHARED["sm_86"], unit


def test_every_tile_of_attention_has_its_kernel(tiles: dict[str, list[tuple[bool, int]]]) -> None:
    known = cuda_binaries.TABLE.read()
    assert known
    for version, table in known.items():
        for unit in tiles.keys() & table.keys():
            names = {f"{unit.rpartition('_')[0]}_{variant}" for variant in range(len(tiles[unit]))}
            assert {row.split()[1] for row in table[unit]} == names, (version, unit)


FED = """
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0110*/                   UTMALDG.5D [UR8], [UR4] ;
        /*0120*/                   UBLKRED.G.S.ADD.F32.RN [UR4], [UR8], UR9 ;
        /*0130*/                   LDGSTS.E.BYPASS.LTC128B.128 [R241], desc[UR24][R148.64], P1 ;
        /*0140*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R241], desc[UR24][R148.64], P1 ;
"""


def test_how_tensor_cores_are_fed_is_counted() -> None:
    counts = {"wgmma": 1, "UTMALDG": 1, "UBLKRED": 1, "LDGSTS": 2, "float atomics": 1}
    assert {k: v for k, v in cuda_binaries.look(FED).items() if k not in ("spills", "loads", "stores")} == counts
    assert "LDGSTS" not in cuda_binaries.look(FED.replace("HGMMA", "HADD2")), "figures of ops that do without"


SERIAL = """
#include "cuda/hopper.cuh"
namespace fastlm::cuda {
struct Arguments {
  float* out;
  int n;
};
template <class T>
__device__ void serial(const Arguments& a) {
  extern __shared__ char shared[];
  const uint32_t at = shared_address(shared);
  float d[32] = {};
  for (int i = 0; i < a.n; ++i) {
    warpgroup_fence();
    multiply_shared<T, 64>(d, descriptor_along<128>(at), descriptor_along<128>(at + 8192), true);
    warpgroup_commit();
    for (int j = 0; j < 32; ++j) d[j] *= 1.5f;
    warpgroup_wait<0>();
  }
  for (int i = 0; i < 32; ++i) a.out[threadIdx.x * 32 + i] = d[i];
}
FASTLM_KERNEL(serial, 0, 128, 1, Arguments, serial<Scalar>)
}
"""


def test_products_that_wait_for_each_other_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(_sources.folder(), tmp_path / "csrc")
    monkeypatch.setattr(_sources, "folder", lambda: tmp_path / "csrc")
    (tmp_path / "csrc" / "cuda" / "op.cu").write_text(SERIAL)
    if _nvrtc.find()[0] is not None:
        with pytest.raises(RuntimeError, match=r"C7514.*serialized"):
            cuda_binaries.with_nvrtc(OP, "bfloat16", "sm_90a")
    if cuda_binaries.nvcc() is not None:
        with pytest.raises(RuntimeError, match=r"C7514.*serialized"):
            cuda_binaries.with_nvcc(OP, "bfloat16", "sm_90a")


KERNELS = """
#include "cuda/other.h"
extern "C" __global__ void __launch_bounds__(256, 4) wide(const uint4* x, uint4* y) {
  __shared__ uint4 kept[SIZE];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[SIZE - 1 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y) {
  float kept[256], sum = 0;
#pragma unroll
  for (int i = 0; i < 256; ++i) sum += kept[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 256; ++i) y[i * 1024 + threadIdx.x] = kept[i] - sum;
}
"""


OP = _sources.Unit("op", "cuda/op.cu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_sources, "folder", lambda: tmp_path)
    monkeypatch.setattr(cuda_binaries, "CACHE", tmp_path / "cache")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "op.cu").write_text(KERNELS)
    (tmp_path / "cuda" / "other.h").write_text("constexpr int SIZE = 256;\n")
    return tmp_path


def test_reads_a_binary(folder: Path) -> None:
    figures = cuda_binaries.figures(cuda_binaries.Job(OP, "bfloat16", "sm_90a"))
    wide, spilling = figures["wide"], figures["spilling"]
    assert wide["most"] == 64 and wide["threads"] == 256 and wide["shared"] >= 4096
    assert wide["loads"] == wide["stores"] == {"16": 1} and not cuda_binaries.complaints("op", "wide", wide)
    assert spilling["most"] == 32 and spilling["threads"] == 1024 and spilling["spills"] > 100
    assert [text.split()[1] for text in cuda_binaries.complaints("op", "spilling", spilling)] == ["spilling", "access"]


def test_a_unit_is_judged_on_the_chips_that_run_it() -> None:
    assert cuda_binaries.chips(OP, "float16") == [*cuda_binaries.CHIPS]
    ampere, hopper = (OP._replace(target=target) for target in (_sources.AMPERE, _sources.HOPPER))
    assert cuda_binaries.chips(ampere, "bfloat16") == ["sm_80", "sm_90a"]
    assert cuda_binaries.chips(ampere, "float16") == cuda_binaries.chips(hopper, "bfloat16") == ["sm_90a"]


def test_the_definitions_of_a_unit_reach_the_compiler(folder: Path) -> None:
    unit = OP._replace(flags=("-DSIZE=128",), name="op_128")
    (folder / "cuda" / "other.h").write_text("")
    assert cuda_binaries.figures(cuda_binaries.Job(unit, "bfloat16", "sm_90a"))["wide"]["shared"] < 4096


def test_the_cache_depends_on_all_a_binary_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = cuda_binaries.Job(OP, "bfloat16", "sm_90a")
    others = (("dtype", "float32"), ("chip", "sm_80"), ("unit", OP._replace(flags=("-DSIZE=1",))))
    digests = {job.digest(), *(job._replace(**{name: value}).digest() for name, value in others)}
    for name in ("op.cu", "other.h"):
        path = folder / "cuda" / name
        path.write_text(path.read_text() + "\n")
        digests.add(job.digest())
    monkeypatch.setattr(cuda_binaries, "version", lambda: "1.0")
    digests.add(job.digest())
    assert len(digests) == 7 and job.digest() in digests


def test_what_does_not_compile_is_said_and_not_kept(folder: Path) -> None:
    (folder / "cuda" / "op.cu").write_text('extern "C" __global__ void f() { int unused = 1; broken }\n')
    figures = cuda_binaries.figures(cuda_binaries.Job(OP, "bfloat16", "sm_90a"))
    assert "broken" in figures["op"]["error"]
    (folder / "cuda" / "op.cu").write_text('extern "C" __global__ void f() { int unused = 1; }\n')
    figures = cuda_binaries.figures(cuda_binaries.Job(OP, "bfloat16", "sm_90a"))
    assert "unused" in figures["op"]["error"], "warnings are errors"
    assert not (folder / "cache").exists()
