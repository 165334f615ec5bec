"""Parallel text: from files to batches, and every file that is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.data import ByteTokenizer, ParallelText, load_tokenizer, pad_sources, read_pairs, target_texts
from fastlm.data.parallel import PAIR_SPECIALS

CONTEXT = 40
PAIRS = [(f"source {i}{' x' * (i % 7)}", f"{'ziel ' * (i % 5 + 1)}{i}") for i in range(90)]


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"train.{side}", *(pair[i] for pair in PAIRS)) for i, side in enumerate(("en", "de"))]


def test_two_files_or_one_table(tmp_path: Path, files: list[Path]) -> None:
    assert read_pairs(files) == PAIRS
    table = write(tmp_path / "pairs.tsv", *map("\t".join, PAIRS[:40]), "", *map("\t".join, PAIRS[40:]))
    assert read_pairs([table]) == PAIRS
    windows = [tmp_path / "a", tmp_path / "b"]
    windows[0].write_bytes("\ufeffein\u2028s\r\n\r\nzwei".encode())
    windows[1].write_bytes(b"one\r\n \r\ntwo")
    assert read_pairs(windows) == [("ein\u2028s", "one"), ("zwei", "two")], "empty on both sides: no pair"


def test_batches_say_what_the_files_say(tmp_path: Path, files: list[Path]) -> None:
    data = ParallelText.prepare(files, tmp_path / "data", "byte", validation=files)
    assert data.tokenizer is data.source_tokenizer and data.tokenizer.vocab_size == 259
    pad, bos, eos = data.tokenizer.require(*PAIR_SPECIALS)
    batches = data.validation_batches(8, CONTEXT)
    seen = []
    for i in range(len(batches)):
        batch = batches[i]
        source, mask, tokens, targets = (batch[name] for name in ("source", "source_mask", "tokens", "targets"))
        assert list(batch) == ["source", "source_mask", "tokens", "targets"]
        assert source.shape == mask.shape and tokens.shape == targets.shape and len(source) == len(tokens) <= 8
        assert mask.dtype is torch.bool and mask[:, 0].all() and mask.any(0).all(), "no column of padding alone"
        assert torch.equal(source == pad, ~mask)
        assert (tokens[:, 0] == bos).all() and (targets != -100).any(0).all()
        real = targets != -100
        assert torch.equal(targets[:, :-1][real[:, 1:]], tokens[:, 1:][real[:, 1:]]), "the token after each"
        assert ((tokens == pad) == ~real).all() and (targets.gather(1, real.sum(1, keepdim=True) - 1) == eos).all()
        sources = [data.source_tokenizer.decode(row[m][:-1].tolist()) for row, m in zip(source, mask, strict=True)]
        assert (source[mask].eq(eos).sum() == len(source)).item()
        seen += list(zip(sources, target_texts(data.tokenizer, targets), strict=True))
    assert sorted(seen) == sorted(PAIRS)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_training_batches_are_a_function_of_seed_and_number(tmp_path: Path, files: list[Path]) -> None:
    data = ParallelText.prepare(files, tmp_path / "data", "byte", validation=files)
    one, two, other = (data.train_batches(8, seed, CONTEXT) for seed in (0, 0, 1))
    numbers = [5, 0, 30, 11, 5]
    again = {n: {name: t.clone() for name, t in two[n].items()} for n in sorted(numbers)}
    for n in numbers:
        assert all(torch.equal(t, again[n][name]) for name, t in one[n].items())
    first = [target_texts(data.tokenizer, batches[0]["targets"]) for batches in (one, other)]
    assert first[0] != first[1]
    epoch = [text for n in range(12) for text in target_texts(data.tokenizer, one[n]["targets"])]
    assert sorted(epoch) == sorted(pair[1] for pair in PAIRS), "each once"
    padding = sum((one[n]["targets"] == -100).sum().item() for n in range(12))
    assert padding < 0.25 * sum(one[n]["targets"].numel() for n in range(12)), "rows of like length stand together"
    with pytest.raises(TypeError, match="no last one"):
        len(one)


def test_the_split_is_by_the_source(tmp_path: Path) -> None:
    pairs = [*PAIRS, *((source, target.upper()) for source, target in PAIRS)]
    table = write(tmp_path / "t.tsv", *map("\t".join, pairs))
    data = ParallelText.prepare([table], tmp_path / "data", "byte")
    assert data.info["train_pairs"] + data.info["validation_pairs"] == len(pairs)
    sides = []
    for pairs_of in (data.train, data.validation):
        rows = pairs_of.source
        sides.append({data.source_tokenizer.decode(rows[i].tolist()) for i in range(len(rows))})
    assert sides[0].isdisjoint(sides[1]) and 2 <= data.info["validation_pairs"] <= 40


def test_what_is_too_long_is_left_out_or_cut(tmp_path: Path) -> None:
    pairs = [("abcdefgh", "xy"), ("ab", "rstuvwxyz"), ("abc", "uvwxy"), ("a", "b")]
    table = write(tmp_path / "t.tsv", *map("\t".join, pairs))
    data = ParallelText.prepare([table], tmp_path / "data", "byte", validation=[table])
    assert data.overlong(6) == 2 and data.overlong(20) == 0
    batch = data.train_batches(8, 0, 6)[0]
    assert sorted(target_texts(data.tokenizer, batch["targets"])) == ["b", "uvwxy"]
    batch = data.validation_batches(4, 6)[0]
    _, _, eos = data.tokenizer.require(*PAIR_SPECIALS)
    assert batch["source"].shape == batch["targets"].shape == (4, 6)
    assert target_texts(data.tokenizer, batch["targets"]) == ["b", "uvwxy", "xy", "rstuvw"]
    assert batch["source"][2].tolist() == [*b"abcde", eos], "a source that is cut ends with [EOS] all the same"
    assert batch["tokens"][3, 1:].tolist() == [*b"rstuv"] and eos not in batch["targets"][3]
    with pytest.raises(ValueError, match="none of the 4 training pairs fits into a context of 1"):
        data.train_batches(2, 0, 1)
    with pytest.raises(ValueError, match="context must be at least 2"):
        data.validation_batches(2, 1)


def test_tokenizers_of_their_own(tmp_path: Path, files: list[Path]) -> None:
    data = ParallelText.prepare(files, tmp_path / "data", "bpe", 300, source_tokenizer="char")
    again = ParallelText.open(tmp_path / "data")
    assert (again.source_tokenizer.kind, again.tokenizer.kind) == ("char", "bpe")
    assert again.info == data.info and again.info["source_vocab_size"] == again.source_tokenizer.vocab_size < 40
    assert again.source_tokenizer.fingerprint == load_tokenizer(tmp_path / "data" / "source").fingerprint
    batch = again.validation_batches(4, CONTEXT)[0]
    assert batch["source"].max() < again.source_tokenizer.vocab_size
    joint = ParallelText.prepare(files, tmp_path / "joint", "bpe", 300)
    assert joint.tokenizer.encode("source") == joint.source_tokenizer.encode("source")
    assert len(joint.tokenizer.encode("ource ")) <= 3 and len(joint.tokenizer.encode("iel")) <= 2, "learns from both"
    given = ParallelText.prepare(files, tmp_path / "given", joint.tokenizer)
    assert given.tokenizer.fingerprint == joint.tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"byte tokenizer has no \[PAD\], \[BOS\], \[EOS\]"):
        ParallelText.prepare(files, tmp_path / "other", ByteTokenizer())


def test_other_files_and_texts(tmp_path: Path, files: list[Path]) -> None:
    data = ParallelText.prepare(files, tmp_path / "data", "byte")
    table = write(tmp_path / "test.tsv", "new one\tneu", "new\tganz neu")
    batch = data.evaluation_batches([table], 4, CONTEXT)[0]
    assert target_texts(data.tokenizer, batch["targets"]) == ["neu", "ganz neu"]
    alone = pad_sources(data.source_tokenizer, [data.source_tokenizer.encode(t) for t in ("new one", "new")], CONTEXT)
    assert torch.equal(alone["source"], batch["source"]) and torch.equal(alone["source_mask"], batch["source_mask"])


def test_bad_files(tmp_path: Path, files: list[Path]) -> None:
    short = write(tmp_path / "short", "a", "b")
    hole = write(tmp_path / "hole", "a", " ")
    three = write(tmp_path / "three.tsv", "a\tb", "a\tb\tc")
    latin = tmp_path / "latin"
    latin.write_bytes("a\nstraße\n".encode("latin-1"))
    for paths, what in (
        ([files[0], short], r"train\.en has 90 lines and .*short 2; line n of one"),
        ([short, hole], r"hole:2 has an empty target"),
        ([hole, short], r"hole:2 has an empty source"),
        ([three], r"three\.tsv:2 must be a source and its target, apart by one tab, got 3 fields"),
        ([short], r"short:1 must be a source and its target, .* got 1 fields"),
        ([short, latin], r"latin:2 is not UTF-8"),
        ([short, short, short], r"two parallel files or one of lines source<TAB>target, got 3 files"),
        ([write(tmp_path / "empty")], r"empty has no pairs"),
        ([write(tmp_path / "one.tsv", "a\tb")], r"one\.tsv has 1 examples, too few to keep some"),
    ):
        with pytest.raises(ValueError, match=what):
            ParallelText.prepare(paths, tmp_path / "data", "byte")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        ParallelText.prepare([tmp_path / "none"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_bad_folders(tmp_path: Path, files: list[Path]) -> None:
    folder = tmp_path / "data"
    ParallelText.prepare(files, folder, "byte", source_tokenizer="byte")
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "task": "classify"}))
    with pytest.raises(ValueError, match="was prepared for the task classify, not seq2seq"):
        ParallelText.open(folder)
    (folder / "dataset.json").write_text(json.dumps(info))
    for side in ("tokens", "lengths"):
        (folder / f"train.source.{side}").write_bytes((folder / f"validation.source.{side}").read_bytes())
    with pytest.raises(ValueError, match=r"train\.source has \d+ rows, train\.target \d+"):
        ParallelText.open(folder)
    (folder / "source" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"source/tokenizer\.json does not exist"):
        ParallelText.open(folder)
