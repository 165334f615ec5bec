"""Embeddings initialised from GloVe's and word2vec's files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.models import CausalLM, CausalLMConfig, load_word_vectors

WORDS = ["the", "cat", "sat", "on", "a b c", "naïve", "absent"]
VECTORS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def write(path: Path, kind: str) -> Path:
    pairs = list(zip(WORDS, VECTORS, strict=False))
    if not kind.startswith("glove"):
        pairs = [(word.replace(" ", "_"), vector) for word, vector in pairs]
    lines = [f"{word} {' '.join(repr(float(x)) for x in vector)}\n".encode() for word, vector in pairs]
    entries = [word.encode() + b" " + vector.astype("<f4").tobytes() for word, vector in pairs]
    content = {
        "glove": b"".join(lines),
        "word2vec": b"6 4\n" + b"".join(lines),
        "binary": b"6 4\n" + b"".join(entry + b"\n" for entry in entries),
        "dense binary": b"6 4\n" + b"".join(entries),
    }[kind.removesuffix(" zipped")]
    path.write_bytes(gzip.compress(content) if kind.endswith("zipped") else content)
    return path


@pytest.mark.parametrize("kind", ["glove", "word2vec", "binary", "dense binary", "binary zipped", "glove zipped"])
def test_rows_are_the_vectors(kind: str, tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(10, 4)
    before = embedding.weight.detach().clone()
    words = [word if kind.startswith("glove") else word.replace(" ", "_") for word in WORDS]
    rows = {word: 9 - i for i, word in enumerate(words)}
    assert load_word_vectors(embedding, write(tmp_path / "vectors", kind), rows) == 6
    assert torch.equal(embedding.weight.detach()[range(9, 3, -1)], torch.from_numpy(VECTORS))
    assert torch.equal(embedding.weight.detach()[:4], before[:4]), "rows of other words stay"
    assert embedding.weight.requires_grad


def test_a_frozen_embedding_is_not_trained(tmp_path: Path) -> None:
    model = CausalLM(CausalLMConfig(vocab_size=10, context=8, layers=1, heads=1, width=4, tied=False))
    load_word_vectors(model.embed, write(tmp_path / "v", "glove"), ["-", *WORDS], freeze=True)
    kept = model.embed.weight.clone()
    model(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8)).loss.backward()
    assert model.embed.weight.grad is None and model.head.weight.grad is not None
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert torch.equal(model.embed.weight, kept) and torch.equal(kept[1:7], torch.from_numpy(VECTORS))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"the 1 2 3\n", "line 1: a word and 4 numbers.*: 3 numbers"),
        (b"the 1 2 3 4\ncat 1 2 x 4\n", "line 2: .*could not convert.*x"),
        (b"2 5\nthe 1 2 3 4 5\n", "width 5, the embedding of 4"),
        (b"2 4\nthe " + VECTORS[0].tobytes() + b"cat \x00\x00", "truncated: it says 2 words and ends within word 2"),
        (b"2 4\nthe \xff\xfe", "truncated"),
        (b"dog 1 2 3 4\n", "none of the 7 words"),
        (b"", "none of the 7 words"),
    ],
)
def test_damaged_files_change_nothing(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(content)
    embedding = torch.nn.Embedding(10, 4)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=what):
        load_word_vectors(embedding, path, WORDS, freeze=True)
    assert torch.equal(embedding.weight, before) and embedding.weight.requires_grad


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        load_word_vectors(torch.nn.Embedding(10, 4), tmp_path / "none", WORDS)
    with pytest.raises(ValueError, match=r"rows in 0 \.\. 1, got 2 for 'sat'"):
        load_word_vectors(torch.nn.Embedding(2, 4), write(tmp_path / "v", "glove"), WORDS)
