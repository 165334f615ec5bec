"""How well classes are told apart: from the counts of each class taken for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class ClassScores:
    """Of one class: precision = right / predicted, recall = right / there, f1 their harmonic mean; each 0 where nothing
    was predicted or nothing is there. support: how many are there."""

    precision: float
    recall: float
    f1: float
    support: int


def confusion(targets: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64: counts[t, p] of class t predicted as p.

    Args:
        targets: numbers of classes, any shape; -100 takes no part.
        predictions: likewise, of the same shape.

    Raises:
        ValueError: shapes differ, or a number lies outside 0 .. classes - 1.
    """
    t, p = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if t.shape != p.shape:
        raise ValueError(f"targets and predictions must have one shape, got {t.shape} and {p.shape}")
    t, p = t[t != IGNORED], p[t != IGNORED]
    for name, found in (("targets", t), ("predictions", p)):
        if found.size and not (found.min() >= 0 and found.max() < classes):
            raise ValueError(f"{name} must lie in 0 .. {classes - 1}, got {found.min()} .. {found.max()}")
    return np.bincount(t * classes + p, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts: np.ndarray) -> float:
    """The share of right predictions, from confusion(); NaN of nothing."""
    total = int(counts.sum())
    return float(np.trace(counts)) / total if total else float("nan")


def class_scores(counts: np.ndarray) -> list[ClassScores]:
    """Precision, recall and F1 of each class, from confusion()."""
    right, there, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    return [
        ClassScores(*precision_recall_f1(int(r), int(p), int(t)), int(t))
        for r, p, t in zip(right, predicted, there, strict=True)
    ]


def macro_f1(counts: np.ndarray) -> float:
    """The mean of the classes' F1, each counting the same however rare; of those that are there or were predicted."""
    found = (counts.sum(0) + counts.sum(1)) > 0
    scores = [scores.f1 for scores, counted in zip(class_scores(counts), found, strict=True) if counted]
    return sum(scores) / len(scores) if scores else float("nan")


def majority_accuracy(train: np.ndarray, counts: np.ndarray) -> float:
    """The accuracy of always answering the class most frequent in training: what a model must beat.

    Args:
        train: (K,), how often each class occurs in the training data.
        counts: from confusion(), of which the targets alone matter.
    """
    total = int(counts.sum())
    return float(counts.sum(1)[int(np.argmax(train))]) / total if total else float("nan")


def precision_recall_f1(right: int, predicted: int, there: int) -> tuple[float, float, float]:
    """From counts; 0 where nothing was predicted or nothing is there."""
    precision, recall = right / predicted if predicted else 0.0, right / there if there else 0.0
    return precision, recall, 2 * right / (predicted + there) if predicted + there else 0.0
