"""Labelled text: tables and columns, folders, padded batches, errors with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm.data import IGNORE, ByteTokenizer, ClassifiedText, TaggedText, write_shard
from fastlm.data.labelled import LabelledText
from fastlm.data.tables import Example, read_classified, read_tagged
from fastlm.data.tokenizer import ENCODER_SPECIALS, load_tokenizer

REVIEWS = [
    (f"this film number {i} is {'good' if i % 3 else 'bad'}{' indeed' * (i % 7)}", "10"[i % 3 == 0]) for i in range(90)
]
SENTENCES = "".join(
    f"Mr\tO\nSmith{i}\tB-PER\nvisits\tO\nNew\tB-LOC\nYork\tI-LOC\n" + "again\tO\n" * (i % 4) + "\n" for i in range(60)
)


def table(path: Path, rows: list[tuple[str, str]], first: bool = False, header: str = "") -> Path:
    lines = ["\t".join(row[::-1] if first else row) for row in rows]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return path


def prepare(task: type[LabelledText], folder: Path, **options: Any) -> LabelledText:
    if task is ClassifiedText:
        path = table(folder / "train.tsv", REVIEWS)
    else:
        path = folder / "train.conll"
        path.write_text(SENTENCES)
    return task.prepare([path], folder / "data", **{"tokenizer": "bpe", "vocab_size": 300, **options})


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_tables_in_either_order_with_and_without_a_header(tmp_path: Path, first: bool, header: bool) -> None:
    names = ("label\tsentence" if first else "sentence\tlabel") if header else ""
    path = table(tmp_path / "t.tsv", REVIEWS, first, names)
    assert read_classified(path) == [Example((text,), (label,)) for text, label in REVIEWS]


def test_tables_of_other_makes(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes('\ufeffindex\tText\tscore\tClass\r\n1\tüber "gut"\t3\tpos\r\n\r\n2\t\t1\tneg'.encode())
    assert read_classified(path) == [Example(('über "gut"',), ("pos",)), Example(("",), ("neg",))]
    path.write_text("a good thing\tb\na bad thing\tc\n")  # as many texts as classes: the classes are short
    assert read_classified(path)[0] == Example(("a good thing",), ("b",))
    path.write_text("pos\tb\npos\tc\n")  # the known ones
    assert read_classified(path, ["b", "c"])[0] == Example(("pos",), ("b",))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "t.tsv has no examples"),
        ("good\t1\nbad 0\n", r"t.tsv:2 must have 2 fields apart by tabs, a text and its class, got 1"),
        ("good\t1\n\nbad\tx\t0\n", r"t.tsv:3 must have 2 fields .*, got 3"),
        ("sentence\tlabel\nbad\t0\t1\n", r"t.tsv:2 must have 2 fields apart by tabs, as its first line, got 3"),
        ("id\tsize\tlabel\n1\t2\t3\n", r"t.tsv:1 must name one column of texts \(sentence, .*\), got id, size, label"),
        ("good\t1\nbad\t\n", r"t.tsv:2 has no label"),
        ("good\t1\nbad\t7\n", r"t.tsv:2 has the label '7', which the training data has not; it has 0, 1"),
    ],
)
def test_malformed_tables(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_classified(tmp_path / "t.tsv", ["0", "1"])


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.conll"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ O O\n\n\nNew York\tB-LOC\n.\tO")
    assert read_tagged(path) == [Example(("EU", "rejects"), ("B-ORG", "O")), Example(("New York", "."), ("B-LOC", "O"))]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("\n\n", "t.conll has no sentences"),
        ("EU B-ORG\nrejects\n", r"t.conll:2 must have a word and its tag, .*, got 'rejects'"),
        ("EU\tB-ORG\nrejects\t\n", r"t.conll:2 has no label"),
        ("EU B-MISC\n", r"t.conll:1 has the label 'B-MISC', which the training data has not; it has B-ORG, O"),
    ],
)
def test_malformed_columns(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "t.conll").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_tagged(tmp_path / "t.conll", ["B-ORG", "O"])


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.tsv does not exist"):
        read_classified(tmp_path / "none.tsv")
    (tmp_path / "t.tsv").write_bytes(b"good\t1\nb\xff\t0\n")
    with pytest.raises(ValueError, match=r"t.tsv:2 is not UTF-8 text: invalid start byte"):
        read_classified(tmp_path / "t.tsv")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [ClassifiedText, TaggedText])
@pytest.mark.parametrize("kind", ["bpe", "word", "char", "byte"])
def test_prepared_and_opened(task: type[LabelledText], kind: str, tmp_path: Path) -> None:
    made = prepare(task, tmp_path, tokenizer=kind)
    opened = task.open(tmp_path / "data")
    assert opened.labels == made.labels == (("0", "1") if task is ClassifiedText else ("B-LOC", "B-PER", "I-LOC", "O"))
    assert opened.info == json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert len(opened.train.rows) + len(opened.validation.rows) == (90 if task is ClassifiedText else 60)
    assert 1 <= len(opened.validation.rows) <= 20
    for number in (0, 17):
        one, other = (data.train_batches(4, 1, 32)[number] for data in (made, opened))
        assert one.keys() == other.keys() == {"tokens", "mask", "targets"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_batch_of_texts_holds(tmp_path: Path) -> None:
    data = prepare(ClassifiedText, tmp_path, tokenizer="byte")
    pad, cls, sep, _ = (data.tokenizer.specials[name] for name in ENCODER_SPECIALS)
    wanted, seen = dict(REVIEWS), {}
    for batches, count in ((data.validation_batches(4, 99), None), (data.train_batches(4, 0, 99), 20)):
        for i in range(len(batches) if count is None else count):
            batch = batches[i]
            for row, mask, target in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True):
                length = int(mask.sum())
                assert mask[:length].all() and (row[length:] == pad).all() and row[0] == cls and row[length - 1] == sep
                seen[data.tokenizer.decode(row[1 : length - 1].tolist())] = data.labels[int(target)]
    assert set(seen.items()) <= set(wanted.items()) and len(seen) > 80


def test_what_a_batch_of_tags_holds(tmp_path: Path) -> None:
    data = prepare(TaggedText, tmp_path)
    batch = data.validation_batches(64, 64)[0]
    for row, mask, targets in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True):
        tags = [data.labels[t] for t in targets.tolist() if t != IGNORE]
        text = data.tokenizer.decode(row[mask][1:-1].tolist())
        assert len(tags) == len(text.split()) and tags[:5] == ["O", "B-PER", "O", "B-LOC", "I-LOC"]
        for place in (targets != IGNORE).nonzero()[1:, 0].tolist():  # at the first id of each word
            assert data.tokenizer.decode([int(row[place])]).startswith(" ")
    assert (batch["targets"][:, 0] == IGNORE).all() and (batch["targets"][~batch["mask"]] == IGNORE).all()


def test_rows_are_cut_at_the_context(tmp_path: Path) -> None:
    for task in (ClassifiedText, TaggedText):
        (tmp_path / task.task).mkdir()
        data = prepare(task, tmp_path / task.task, tokenizer="byte")
        for batches in (data.train_batches(4, 0, 10), data.validation_batches(4, 10)):
            batch = batches[0]
            assert batch["tokens"].shape[1] == 10 and (batch["tokens"][:, -1] == data.tokenizer.specials["[SEP]"]).all()
            assert batch["targets"].shape == ((len(batch["tokens"]),) if task is ClassifiedText else (4, 10))


def test_files_of_their_own_to_validate_and_to_test_on(tmp_path: Path) -> None:
    held_out = table(tmp_path / "dev.tsv", [("a good film", "1"), ("a bad film", "0")], first=True)
    data = prepare(ClassifiedText, tmp_path, validation=held_out)
    assert len(data.train.rows) == 90 and len(data.validation.rows) == 2
    test = data.evaluation_batches(held_out, 8, 32)
    assert len(test) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(test[0].values(), data.validation_batches(8, 32)[0].values(), strict=True)
    )
    with pytest.raises(ValueError, match=r"other.tsv:1 has the label '5'"):
        data.evaluation_batches(table(tmp_path / "other.tsv", [("a film", "5")]), 8, 32)
    with pytest.raises(ValueError, match=r"other.tsv:1 has the label '5'"):
        prepare(ClassifiedText, tmp_path, validation=tmp_path / "other.tsv")


def test_equal_texts_stand_on_one_side(tmp_path: Path) -> None:
    table(tmp_path / "t.tsv", REVIEWS * 3)
    data = ClassifiedText.prepare([tmp_path / "t.tsv"], tmp_path / "data", "byte")
    texts = [{bytes(side.rows[i].tolist()) for i in range(len(side.rows))} for side in (data.train, data.validation)]
    assert not texts[0] & texts[1] and len(texts[0]) + len(texts[1]) == 90


def test_weights_that_balance_the_classes(tmp_path: Path) -> None:
    for task in (ClassifiedText, TaggedText):
        (tmp_path / task.task).mkdir()
        data = prepare(task, tmp_path / task.task)
        counts, weights = data.train.counts(len(data.labels)), np.array(data.class_weights())
        assert counts.min() > 0 and counts.sum() == (data.train.labels < len(data.labels)).sum()
        assert np.allclose(counts * weights, counts.sum() / len(counts)), "each has the same share"


def test_a_tokenizer_that_is_there_already(tmp_path: Path) -> None:
    ready = ByteTokenizer(ENCODER_SPECIALS)
    assert prepare(ClassifiedText, tmp_path, tokenizer=ready).tokenizer.fingerprint == ready.fingerprint
    with pytest.raises(ValueError, match=r"the byte tokenizer has no \[PAD\]"):
        prepare(ClassifiedText, tmp_path, tokenizer=ByteTokenizer())


@pytest.mark.parametrize("task", [ClassifiedText, TaggedText])
def test_the_tokenizer_of_a_bert(task: type[LabelledText], tmp_path: Path) -> None:
    """WordPiece in lower case, from a folder of transformers: its specials have the names that are looked for."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    inner = Inner(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [text for text, _ in REVIEWS] + SENTENCES.split()
    inner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=["[UNK]", *ENCODER_SPECIALS]),
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    data = prepare(task, tmp_path, tokenizer=load_tokenizer(tmp_path))
    batch = data.validation_batches(8, 64)[0]
    ids = batch["tokens"][0][batch["mask"][0]].tolist()
    shown = [inner.id_to_token(i) for i in ids]
    assert shown[0] == "[CLS]" and shown[-1] == "[SEP]" and "[UNK]" not in shown
    assert "film" in shown if task is ClassifiedText else "mr" in shown


def test_an_empty_text_is_one_unknown_word(tmp_path: Path) -> None:
    table(tmp_path / "t.tsv", [*REVIEWS, ("", "1")])
    data = ClassifiedText.prepare([tmp_path / "t.tsv"], tmp_path / "data", "byte")
    assert min(data.train.rows.lengths.min(), data.validation.rows.lengths.min()) == 1


def test_errors(tmp_path: Path) -> None:
    data = prepare(ClassifiedText, tmp_path)
    with pytest.raises(ValueError, match="was prepared for the task classify, not tag"):
        TaggedText.open(data.folder)
    with pytest.raises(ValueError, match="context must be at least 3, got 2"):
        data.validation_batches(4, 2)
    with pytest.raises(TypeError, match="have no last one"):
        len(data.train_batches(4, 0, 16))
    for rows, match in (
        ([("a", "1"), ("b", "1")], "t.tsv must have at least two labels, got 1"),
        ([("sentence", "label"), ("a b c", "1"), ("a b c", "0")], "t.tsv has 2 examples, too few to keep some"),
    ):
        with pytest.raises(ValueError, match=match):
            ClassifiedText.prepare([table(tmp_path / "t.tsv", rows)], tmp_path / "other")
    with pytest.raises(ValueError, match="one or more labelled files, got none"):
        ClassifiedText.prepare([], tmp_path / "other")
    mark = data.tokenizer.fingerprint
    write_shard(data.folder / "train.labels", np.zeros(3, dtype=int), 3, mark)
    with pytest.raises(ValueError, match=r"train.labels has 3 labels, train.tokens beside it has \d+ places"):
        ClassifiedText.open(data.folder)
