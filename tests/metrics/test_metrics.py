"""Perplexity, bits per byte, the byte bigram."""

from __future__ import annotations

import math

import pytest

from fastlm.metrics import bigram_bits_per_byte, bits_per_byte, perplexity


def test_identities() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(8 * 100 * math.log(2), 100) == pytest.approx(8)
    with pytest.raises(ValueError, match="got 0"):
        bits_per_byte(1.0, 0)


def test_bigram_by_hand() -> None:
    # Pairs of "\nabab": \n a, a b, b a, a b. Validation "ab": \n a, a b.
    p_a = (1 + 1) / (1 + 256)
    p_b = (2 + 1) / (2 + 256)
    expected = -(math.log2(p_a) + math.log2(p_b)) / 2
    assert bigram_bits_per_byte(["abab"], ["ab"], smoothing=1.0) == pytest.approx(expected)


def test_bigram_without_knowledge_spends_eight_bits() -> None:
    assert bigram_bits_per_byte([], ["anything"], smoothing=1.0) == pytest.approx(8)


def test_the_best_smoothing_is_taken() -> None:
    train, validation = ["hello world " * 50], ["hello world " * 5]
    best = bigram_bits_per_byte(train, validation)
    assert best == min(bigram_bits_per_byte(train, validation, s) for s in (1.0, 0.1, 0.01))
    with pytest.raises(ValueError, match="at least one byte"):
        bigram_bits_per_byte(train, [""])
