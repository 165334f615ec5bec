"""Counts, accuracy, F1 and entity spans, against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastlm.metrics import (
    accuracy,
    class_scores,
    confusion,
    macro_f1,
    majority_accuracy,
    span_scores,
    spans,
)


def test_by_hand() -> None:
    targets, predictions = [0, 0, 0, 1, 1, 2, -100], [0, 0, 1, 1, 0, 1, 2]
    counts = confusion(targets, predictions, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert accuracy(counts) == 3 / 6
    zero, one, two, three = class_scores(counts)
    assert (zero.precision, zero.recall, zero.f1, zero.support) == (2 / 3, 2 / 3, 2 / 3, 3)
    assert (one.precision, one.recall, one.f1, one.support) == (1 / 3, 1 / 2, 2 / 5, 2)
    assert (two.precision, two.recall, two.f1, two.support) == (0, 0, 0, 1)
    assert (three.f1, three.support) == (0, 0)
    assert macro_f1(counts) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3), "of the three classes that occur"
    assert majority_accuracy(np.array([1, 5, 2, 0]), counts) == 2 / 6


def test_figures_of_random_predictions() -> None:
    """F1 by its definition, over arrays of two dimensions; perfect predictions are 1."""
    targets, predictions = np.random.randint(0, 5, (40, 30)), np.random.randint(0, 5, (40, 30))
    counts = confusion(targets, predictions, 5)
    assert counts.sum() == 1200 and accuracy(counts) == pytest.approx((targets == predictions).mean())
    for k, scores in enumerate(class_scores(counts)):
        right = ((targets == k) & (predictions == k)).sum()
        p, r = right / (predictions == k).sum(), right / (targets == k).sum()
        assert (scores.precision, scores.recall) == pytest.approx((p, r))
        assert scores.f1 == pytest.approx(2 * p * r / (p + r))
    perfect = confusion(targets, targets, 5)
    assert accuracy(perfect) == macro_f1(perfect) == 1


def test_of_nothing() -> None:
    counts = confusion([-100], [3], 2)
    assert math.isnan(accuracy(counts)) and math.isnan(macro_f1(counts))
    assert math.isnan(majority_accuracy(np.array([1, 0]), counts))


def test_spans_as_conlleval_finds_them() -> None:
    assert spans(["B-PER", "I-PER", "O", "B-LOC"]) == {("PER", 0, 2), ("LOC", 3, 4)}
    assert spans(["B-PER", "B-PER", "I-PER"]) == {("PER", 0, 1), ("PER", 1, 3)}
    assert spans(["I-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 1), ("LOC", 1, 3)}
    assert spans(["O", "I-LOC", "O", "B-A-B", "I-A-B"]) == {("LOC", 1, 2), ("A-B", 3, 5)}
    assert spans([]) == spans(["O", "NN", "B", "I"]) == set()


def test_span_scores_by_hand() -> None:
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    given = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC"]]
    total, by_kind = span_scores(wanted, given)
    assert (total.precision, total.recall, total.f1, total.support) == (1 / 3, 1 / 3, 1 / 3, 3)
    assert (by_kind["PER"].precision, by_kind["PER"].recall, by_kind["PER"].support) == (1 / 2, 1, 1)
    assert (by_kind["LOC"].precision, by_kind["LOC"].recall, by_kind["LOC"].support) == (0, 0, 2)
    assert span_scores(wanted, wanted)[0].f1 == 1
    assert span_scores([["O"]], [["O"]]) == (class_scores(np.zeros((1, 1), dtype=int))[0], {})


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(1,\)"):
        confusion([0, 1], [0], 2)
    with pytest.raises(ValueError, match=r"predictions must lie in 0 \.\. 1, got 0 \.\. 2"):
        confusion([0, 1], [0, 2], 2)
    with pytest.raises(ValueError, match="as many sentences, got 1, 0"):
        span_scores([["O"]], [])
    with pytest.raises(ValueError, match="sentence 0 has 1 tags, but 2 predictions"):
        span_scores([["O"]], [["O", "O"]])
