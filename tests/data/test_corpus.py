"""Corpora: deterministic, split without leaks, with clear errors."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from fastlm.data import Corpus, from_paths, standard_library


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return standard_library(megabytes=1.0)


def test_standard_library_is_deterministic_and_sized(stdlib: Corpus) -> None:
    again = standard_library(megabytes=1.0)
    assert again == stdlib and len(stdlib.sha256) == 64
    assert 0.5e6 < sum(stdlib.bytes) <= 1e6
    assert "Python 3." in stdlib.source and stdlib.licence == "PSF-2.0"


def test_no_document_stands_on_both_sides(stdlib: Corpus) -> None:
    assert stdlib.train and stdlib.validation
    assert not set(stdlib.train) & set(stdlib.validation)
    assert 0.02 < len(stdlib.validation) / len(stdlib.train + stdlib.validation) < 0.25


def test_the_side_of_a_document_does_not_depend_on_the_others(stdlib: Corpus) -> None:
    larger = standard_library(megabytes=2.0)
    assert set(stdlib.train) <= set(larger.train)
    assert set(stdlib.validation) <= set(larger.validation)


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no sources to train on.*found 0.*give text files"):
        standard_library()


def test_tests_and_undecodable_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for i in range(30):
        (tmp_path / "a" / f"m{i}.py").write_text(f"# {i}\n" + "x = 1\n" * 1000)
    (tmp_path / "a" / "test" / "t.py").write_text("leak")
    (tmp_path / "site-packages" / "p.py").write_text("leak")
    (tmp_path / "bad.py").write_bytes(b"# \xff\xfe\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    documents = [*(c := standard_library()).train, *c.validation]
    assert len(documents) == 31 and "leak" not in documents
    assert any("é" in text for text in documents)


def test_one_file_gives_its_last_tenth(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("0123456789" * 10)
    corpus = from_paths([tmp_path / "t.txt"])
    assert corpus.train == ("0123456789" * 9,) and corpus.validation == ("0123456789",)


def test_folders_split_by_file_and_copies_stay_together(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i % 20}")
    corpus = from_paths([tmp_path])
    assert len(corpus.train) + len(corpus.validation) == 20
    assert not set(corpus.train) & set(corpus.validation)


def test_two_files_give_one_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    corpus = from_paths([tmp_path])
    assert sorted(corpus.train + corpus.validation) == ["one", "two"] and len(corpus.train) == 1


def test_newlines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\n" * 20)
    corpus = from_paths([tmp_path / "t.txt"])
    assert corpus.train[0] + corpus.validation[0] == "a\r\nb\n" * 20


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none"):
        from_paths([])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt does not exist"):
        from_paths([tmp_path / "missing.txt"])
    with pytest.raises(FileNotFoundError, match=r"no text file"):
        from_paths([tmp_path])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        from_paths([tmp_path / "empty.txt"])
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="1 characters, too few"):
        from_paths([tmp_path / "one.txt"])
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.txt is not UTF-8.*byte 2"):
        from_paths([tmp_path / "binary.txt"])
