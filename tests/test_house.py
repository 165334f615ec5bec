"""The rules of the house, executed: floors, rooms, length of files, environment variables, weak symbols."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm._dispatch import NAMES, Op

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {  # imports go down only
    "cli": 7, "__main__": 7,
    "train": 6, "info": 6,
    "data": 5, "metrics": 5, "hf": 5,
    "models": 4, "patching": 4,
    "nn": 3, "optim": 3,
    "ops": 2,
    "_dispatch": 1, "native": 1, "cuda": 1, "reference": 1, "kernels": 1,
    "_C": 0, "_version": 0, "_malloc": 0, "_shadow": 0, "_walk": 0,
}  # fmt: skip
PYTHON = sorted(p for p in (ROOT / "fastlm").rglob("*.py") if "kernels" not in p.parts)
SOURCES = sorted(
    p for folder in ("fastlm", "kernels", "csrc", "tests", "bench") for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and "fastlm/kernels" not in p.as_posix()
)  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT / "fastlm").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of every module the file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    if path == ROOT / "fastlm" / "__init__.py":
        return
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "fastlm" or len(parts) < 2 or parts[1] == here or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] < FLOORS[here], f"{path.relative_to(ROOT)} (floor {FLOORS[here]}) imports {name}"


def test_every_room_has_a_floor() -> None:
    assert {room(p) for p in PYTHON} - {"__init__"} <= set(FLOORS)


def test_import_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import fastlm, fastlm.nn, fastlm.optim, fastlm.info;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    extra = set(ast.literal_eval(out)) - {"fastlm", "torch", "numpy"}
    assert not extra, f"import fastlm pulls in {extra}"


@pytest.mark.parametrize("name", sorted(Op.registry))
def test_an_op_has_the_same_name_in_every_room(name: str) -> None:
    rooms = {"cpu": "native", "cuda": "cuda", "triton": "kernels", "reference": "reference"}
    rows = Op.registry[name].rows
    assert "reference" in rows
    for backend, row in rows.items():
        assert row.module == f"fastlm.{rooms[backend]}.{name}"
    for room in ("ops", *(rooms[backend] for backend in rows)):
        assert (ROOT / "fastlm" / room / f"{name}.py").exists(), f"fastlm/{room}/{name}.py is missing"
    for folder, kind in (("tests/ops", "test"), ("bench", "bench")):
        assert (ROOT / folder / f"{kind}_{name}.py").exists(), f"{folder}/{kind}_{name}.py is missing"
    assert set(rows) <= set(NAMES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_two_environment_variables() -> None:
    found: set[str] = set()
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("FASTLM_"):
                found |= {node.value.partition("=")[0]}
    assert found <= {"FASTLM_BACKEND", "FASTLM_STRICT"}, found


def test_torch_stays_out_of_the_extension_and_pybind11_in_one_file() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "torch/" not in text, path
            assert ("#include <pybind11" in text) == (path.name == "bindings.cpp"), path


def test_kernels_is_a_namespace() -> None:
    """A top-level kernels/__init__.py would shadow the package of that name that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_objects_of_an_instruction_set_have_no_weak_symbols() -> None:
    """The linker may pick any copy of a weak symbol, an AVX-512 one for the baseline: an illegal instruction."""
    objects = [p for p in (ROOT / "build").glob("temp*/*.o") if p.name.count(".") == 2]
    if not objects:
        pytest.skip("the extension was not built from this folder")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        # DW.ref is data that every C++ object has: the address of the exception handler.
        weak = [line for line in symbols.splitlines() if line[17:18] in {"W", "V", "u"} and "DW.ref" not in line]
        assert not weak, f"{path.name}: {weak[:3]}"


@pytest.mark.parametrize(("name", "value"), [("FASTLM_BACKEND", "gpu"), ("FASTLM_STRICT", "yes")])
def test_environment_variables_are_checked(name: str, value: str) -> None:
    environment = {**os.environ, name: value}
    run = subprocess.run([sys.executable, "-c", "import fastlm"], env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and value in run.stderr.splitlines()[-1]


def test_version_is_told_once() -> None:
    assert fastlm.__version__ == (ROOT / "fastlm" / "_version.py").read_text().split('"')[-2]
