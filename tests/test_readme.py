"""Every command of README runs, every Python block runs, and its table is the one the results make."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.partition("#")[0].strip()
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)


def make(*arguments: str, dry: bool = False) -> subprocess.CompletedProcess[str]:
    """make with this interpreter's environment taken for the installed one."""
    prefix = sys.prefix
    command = ["make", f"VENV={prefix}", "-o", f"{prefix}/.installed", *(["-n"] if dry else []), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, tmp_path: Path) -> None:
    """Long ones in a short form: the demo for a few seconds, tests and benches as make and pytest would start them."""
    words = command.split()
    if words[:2] == ["make", "demo"]:
        run = make("demo", f"ARGS=--minutes 0.05 --out {tmp_path}/demo")
    elif words[0] == "make":
        run = make(*words[1:], dry=True)
    elif words[:2] == ["pip", "install"]:
        options = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        target = [word.strip('"') for word in words[2:]]
        run = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *target], cwd=ROOT, capture_output=True, text=True
        )
    elif words[:2] == ["python", "-m"] and words[2].startswith("bench"):
        run = subprocess.run([sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True)
    elif words[:2] == ["pytest", "bench"]:
        options = ["-q", "-k", "layer_norm and 768x128 and float32 and eager", f"--benchmark-json={tmp_path}/b.json"]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "bench", *options], cwd=ROOT, capture_output=True, text=True
        )
    elif words[0] == "fastlm":
        run = subprocess.run([sys.executable, "-m", "fastlm.cli", words[1], "--help"], capture_output=True, text=True)
    else:
        pytest.fail(f"no test runs README's command {command!r}")
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_table_is_made_of_the_committed_results() -> None:
    run = subprocess.run([sys.executable, "-m", "bench.report", "--check"], cwd=ROOT)
    assert run.returncode == 0, "run `python -m bench.report`"


def test_a_copy_of_readme_names_no_file_that_is_missing() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"
