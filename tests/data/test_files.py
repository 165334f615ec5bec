"""Atomic files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastlm.data import atomic_file, atomic_folder, recover_folder


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert not os.listdir(tmp_path)
    with atomic_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["f"]


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "d") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path) == ["d"] and os.listdir(tmp_path / "d") == ["two"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d") as folder:
        (folder / "three").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["d"] and os.listdir(tmp_path / "d") == ["two"]


@pytest.mark.parametrize("which", [1, 2])
def test_a_crash_at_either_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    with atomic_folder(tmp_path / "d") as folder:
        (folder / "old").write_text("old")
    real, calls = os.replace, 0

    def crash(a: Path, b: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == which:
            raise OSError("crash")
        real(a, b)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="crash"), atomic_folder(tmp_path / "d") as folder:
        (folder / "new").write_text("new")
    monkeypatch.setattr(os, "replace", real)
    recover_folder(tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"] and os.listdir(tmp_path / "d") == ["old"]


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".d.1.tmp").mkdir()
    with atomic_folder(tmp_path / "d") as folder:
        (folder / "x").write_text("x")
    assert os.listdir(tmp_path) == ["d"]
