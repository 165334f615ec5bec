"""Tokenizers: decode(encode(x)) == x, files, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastlm.data import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from fastlm.data.tokenizer import ENCODER_SPECIALS, make_tokenizer

TEXTS = [
    "",
    "plain text, twice: plain text",
    "def f(x):\n    return x  \n\n\n\tpass\r\n",
    "中文 héllo 🙂🏽 \u200b\u0000 \ufffd e\u0301",
    "a <|endoftext|> in the text",
    "   leading and trailing   ",
]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(["def function(argument):\n    return argument\n" * 50, "hello hello world\n" * 50], 320)


def every(bpe: BPETokenizer) -> list[Tokenizer]:
    return [bpe, ByteTokenizer(), CharTokenizer.train(TEXTS)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(bpe: BPETokenizer, text: str) -> None:
    for tokenizer in every(bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, tokenizer.kind
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_round_trip_of_random_text(bpe: BPETokenizer) -> None:
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(200):
        text = "".join(map(chr, random.choices(points, k=random.randrange(20))))
        assert bpe.decode(bpe.encode(text)) == text
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_merges_are_learned(bpe: BPETokenizer) -> None:
    assert len(bpe.encode("def function(argument):")) < 12
    assert 257 < bpe.vocab_size <= 320


def test_saved_and_loaded(bpe: BPETokenizer, tmp_path: Path) -> None:
    for tokenizer in every(bpe):
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load_tokenizer(tmp_path / tokenizer.kind)
        assert (loaded.kind, loaded.vocab_size, loaded.separator, loaded.fingerprint) == (
            tokenizer.kind, tokenizer.vocab_size, tokenizer.separator, tokenizer.fingerprint,
        )  # fmt: skip
        assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_documents_end_with_the_separator(bpe: BPETokenizer) -> None:
    ids = bpe.encode_documents(["hello", "", "world"]).tolist()
    end = bpe.separator
    assert ids == [*bpe.encode("hello"), end, end, *bpe.encode("world"), end]
    assert ByteTokenizer().encode_documents(["ab", "c"]).tolist() == [97, 98, 99]
    assert bpe.encode_documents([]).size == 0


def test_errors(bpe: BPETokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'z' is not among the 2 characters"):
        CharTokenizer("ab").encode("abz")
    with pytest.raises(ValueError, match="different characters"):
        CharTokenizer("aa")
    with pytest.raises(ValueError, match=r"at least 257.*got 100"):
        BPETokenizer.train(["x"], 100)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({"type": "other"}))
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(tmp_path)


def test_bytes_that_are_no_character_do_not_raise() -> None:
    assert ByteTokenizer().decode([0xE4, 0xB8]) == "\ufffd"


def with_specials() -> list[Tokenizer]:
    texts = ["def function(argument):\n    return [MASK] [PAD]\n" * 50]
    return [make_tokenizer(kind, texts, TEXTS, 300, ENCODER_SPECIALS) for kind in ("bpe", "char", "byte")]


def test_specials_have_ids_that_no_text_encodes_to(tmp_path: Path) -> None:
    for tokenizer in with_specials():
        named = {name: tokenizer.specials[name] for name in ENCODER_SPECIALS}
        assert len(set(named.values())) == 4 and all(i < tokenizer.vocab_size for i in named.values())
        for text in [*TEXTS, "return [MASK][PAD]"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and not set(ids) & set(named.values())
        assert tokenizer.decode([*tokenizer.encode("a"), named["[MASK]"]]) == "a[MASK]"
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load_tokenizer(tmp_path / tokenizer.kind)
        assert loaded.specials == tokenizer.specials and loaded.fingerprint == tokenizer.fingerprint
        assert loaded.require("[PAD]", "[SEP]") == [named["[PAD]"], named["[SEP]"]]


def test_files_without_specials_keep_their_fingerprint() -> None:
    """Shards of before name it."""
    assert json.loads(ByteTokenizer().to_json()) == {"type": "fastlm-byte"}
    assert json.loads(CharTokenizer("ab").to_json()) == {"type": "fastlm-char", "characters": "ab"}


def test_missing_and_doubled_specials(bpe: BPETokenizer) -> None:
    assert list(bpe.specials) == ["<|endoftext|>"]
    with pytest.raises(ValueError, match=r"the bpe tokenizer has no \[MASK\], .* it has <\|endoftext\|>"):
        bpe.require("[MASK]")
    with pytest.raises(ValueError, match=r"the byte tokenizer has no \[PAD\], .* it has no special tokens"):
        make_tokenizer(ByteTokenizer(), [], [], specials=["[PAD]"])
    with pytest.raises(ValueError, match="specials must be different names"):
        ByteTokenizer(["[PAD]", "[PAD]"])
    with pytest.raises(ValueError, match="vocab_size must be at least 261"):
        BPETokenizer.train(["a"], 260, ENCODER_SPECIALS)


def test_words(tmp_path: Path) -> None:
    text = "It's the well-known cat, isn't it? The cat! It's well-known, isn't it? Once."
    tokenizer = WordTokenizer.train([text], 100, ENCODER_SPECIALS)
    assert tokenizer.words == ["<unk>", ",", "?", "It's", "cat", "isn't", "it", "well-known"]
    assert tokenizer.vocab_size == 12 and list(tokenizer.specials) == list(ENCODER_SPECIALS)
    ids = tokenizer.encode("It's a cat , isn't it ?\n")
    assert ids == [3, 0, 4, 1, 5, 6, 2] and tokenizer.decode(ids) == " It's <unk> cat, isn't it?"
    assert "".join(tokenizer.decode([i]) for i in ids) == tokenizer.decode(ids)
    assert WordTokenizer.train([text], 4).words == ["<unk>", ",", "?", "It's"], "the commonest, then by the alphabet"
    assert WordTokenizer._PATTERN.findall("do n't you 's") == ["do", "n't", "you", "'s"]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, WordTokenizer) and again.fingerprint == tokenizer.fingerprint and again.encode(text)
    assert make_tokenizer("word", [text], [], 100).vocab_size == 8
    with pytest.raises(ValueError, match="at least 6 for words, got 5"):
        WordTokenizer.train([text], 5, ENCODER_SPECIALS)
    with pytest.raises(ValueError, match="different words"):
        WordTokenizer(["a", "a"])
