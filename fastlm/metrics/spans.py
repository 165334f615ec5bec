"""Entities in tagged sentences: the CoNLL measure (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050)."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.metrics.classification import ClassScores, precision_recall_f1


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, start and end of the entities of a sentence in BIO tags.

    B-X begins an entity X, I-X goes on with it; an I-X after O or after another type begins one, as in conlleval. Any
    tag that begins with neither is outside.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = None, 0
    for place, tag in enumerate((*tags, "O")):
        prefix, _, name = tag.partition("-")
        inside = prefix in ("B", "I") and bool(name)
        if kind is not None and not (inside and prefix == "I" and name == kind):
            found.add((kind, start, place))
            kind = None
        if inside and kind is None:
            kind, start = name, place
    return found


def span_scores(
    targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> tuple[ClassScores, dict[str, ClassScores]]:
    """Precision, recall and F1 of whole entities, of all and of each type: right are those of type, start and end.

    Args:
        targets, predictions: the tags of each sentence, word by word.

    Raises:
        ValueError: another number of sentences, or of tags in one.
    """
    if len(targets) != len(predictions):
        raise ValueError(f"targets and predictions must have as many sentences, got {len(targets)}, {len(predictions)}")
    counts: dict[str, list[int]] = {}  # right, predicted, there
    for number, (wanted, given) in enumerate(zip(targets, predictions, strict=True)):
        if len(wanted) != len(given):
            raise ValueError(f"sentence {number} has {len(wanted)} tags, but {len(given)} predictions")
        there, predicted = spans(wanted), spans(given)
        for place, group in enumerate((there & predicted, predicted, there)):
            for kind, _, _ in group:
                counts.setdefault(kind, [0, 0, 0])[place] += 1
    by_kind = {kind: ClassScores(*precision_recall_f1(*counts[kind]), counts[kind][2]) for kind in sorted(counts)}
    total = [sum(c[i] for c in counts.values()) for i in range(3)]
    return ClassScores(*precision_recall_f1(*total), total[2]), by_kind
