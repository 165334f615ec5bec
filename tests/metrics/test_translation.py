"""BLEU, chrF and exact match against values computed by hand; some are sacrebleu 2.6.0's too, and say so."""

from __future__ import annotations

import math

import pytest

from fastlm.metrics import bleu, chrf, exact_match
from fastlm.metrics.translation import tokenize_13a


def test_bleu_by_hand() -> None:
    """the cat sat on the mat | the cat is on the mat: 5 of 6 words, 3 of 5, 1 of 4, 0 of 3 longer runs, smoothed to
    1/6; no brevity penalty."""
    value = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert bleu(["the cat sat on the mat"], ["the cat is on the mat"]) == pytest.approx(value)


def test_words_count_as_often_as_the_reference_has_them() -> None:
    """Papineni et al.'s example: of seven "the" two are right. No pair is, so that orders 2 to 4 are smoothed."""
    value = 100 * (2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** 0.25
    assert bleu(["the the the the the the the"], ["the cat is on the mat."]) == pytest.approx(value)


def test_counts_are_of_the_corpus() -> None:
    """Two sentences: 9 of 10 words, 7 of 8 pairs, 5 of 6 triples, 3 of 4 fours; 10 words for 11."""
    hypotheses = ["a b c d e f", "g h i x"]
    value = 100 * math.exp(1 - 11 / 10) * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert bleu(hypotheses, ["a b c d e f", "g h i j k"]) == pytest.approx(value)
    assert bleu(hypotheses, hypotheses) == pytest.approx(100.0)


def test_bleu_of_nothing() -> None:
    assert bleu([""], ["a b c d"]) == 0.0
    assert bleu(["e f g h"], ["a b c d"]) == 0.0
    assert bleu(["a b c"], ["a b c"]) == 0.0, "no run of four words at all, as sacrebleu has it"


def test_longer_hypotheses_are_not_penalised_twice() -> None:
    assert bleu(["a b c d e"], ["a b c d"]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_sacrebleu_gives_the_same() -> None:
    hypotheses = ["Ein Mann, der 3.5-mal läuft.", "Two dogs' toys cost $5,000 (US)."]
    references = ["Ein Mann, der 3,5-mal rennt.", "Two dogs' toys cost $5,000 (USD)!"]
    assert bleu(hypotheses, references) == pytest.approx(53.73169519197062, abs=1e-9)
    assert chrf(hypotheses, references) == pytest.approx(74.6077853296827, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, it's 3.5-fold.", ["Hello", ",", "it's", "3.5", "-", "fold", "."]),
        ("a-b 1,000 x,y 5.", ["a-b", "1,000", "x", ",", "y", "5", "."]),
        ("&quot;A&amp;B&lt;C&gt;", ['"', "A", "&", "B", "<", "C", ">"]),
        ("(a/b) [c] {d}: e;", ["(", "a", "/", "b", ")", "[", "c", "]", "{", "d", "}", ":", "e", ";"]),
        ("hyphen-\nated\nwords “so”", ["hyphenated", "words", "“so”"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert tokenize_13a(text) == words


def test_chrf_by_hand() -> None:
    """abcd | abce: of orders 1 to 4 the shares 3/4, 2/3, 1/2, 0 on both sides; orders 5 and 6 are not there."""
    assert chrf(["abcd"], ["abce"]) == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    precision, recall = (2 / 3 + 1 / 2) / 2, (2 / 2 + 1 / 1) / 2  # abx | ab
    assert chrf(["abx"], ["ab"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    assert chrf(["a b c d"], ["ab cd"]) == pytest.approx(100.0), "spaces do not count"
    assert chrf(["xyz"], ["abc"]) == chrf([""], ["abc"]) == 0.0


def test_exact_match() -> None:
    assert exact_match(["a b", " c ", "d"], ["a b", "c", "e"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [bleu, chrf, exact_match])
def test_bad_arguments(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="as many, at least 1, got 1 and 2"):
        metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        metric([], [])
    with pytest.raises(ValueError, match="sequences of texts, got a text"):
        metric("abc", ["a", "b", "c"])
