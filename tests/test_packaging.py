"""What an install does without a compiler, without the symbolic link, and what the source archive holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files git would hand out, without what was built."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "runs")
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
    import sysconfig

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
