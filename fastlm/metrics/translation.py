"""How near what a model wrote comes to what was to be written: BLEU, chrF, exact match. One reference a hypothesis."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2.0


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in percent (Papineni et al. 2002), the figure of `sacrebleu --tokenize 13a` (Post 2018,
    arXiv:1804.08771).

    100 * min(1, exp(1 - r / h)) * (p1 p2 p3 p4)^(1/4), p_n the share of the hypotheses' n-grams that stand in their
    references, each as often at most, over the whole corpus; h and r the words of hypotheses and references. Words are
    those of tokenize_13a(). Where no n-gram of an order is found, p_n is 1 / (2^k * count), k counting such orders
    (NIST's smoothing); 0 if not even a word is.

    Args:
        hypotheses, references: texts, one of each for every sentence.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    _check(hypotheses, references)
    found, total = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    words, expected = 0, 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = tokenize_13a(hypothesis), tokenize_13a(reference)
        words, expected = words + len(ours), expected + len(theirs)
        for n in range(1, BLEU_ORDER + 1):
            a, b = _ngrams(ours, n), _ngrams(theirs, n)
            found[n - 1] += (a & b).total()
            total[n - 1] += a.total()
    if not found[0] or not all(total):
        return 0.0
    logs, halvings = 0.0, 0
    for right, count in zip(found, total, strict=True):
        halvings += not right
        logs += math.log((right or 2.0**-halvings) / count)
    return 100 * math.exp(min(0.0, 1 - expected / words) + logs / BLEU_ORDER)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 in percent (Popović 2015): character n-grams of orders 1 to 6, without spaces; needs no tokenizer.

    F = (1 + b^2) P R / (b^2 P + R), b = 2: recall counts twice as much. P and R are means over the orders of the share
    of n-grams of the hypotheses found in the references, and the other way round, over the whole corpus. Orders that a
    side has no n-grams of are left out.

    Args, Raises: as bleu().
    """
    _check(hypotheses, references)
    ours, theirs, found = [0] * CHRF_ORDER, [0] * CHRF_ORDER, [0] * CHRF_ORDER
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        characters = ["".join(text.split()) for text in (hypothesis, reference)]
        for n in range(1, CHRF_ORDER + 1):
            a, b = (_ngrams(text, n) for text in characters)
            ours[n - 1] += a.total()
            theirs[n - 1] += b.total()
            found[n - 1] += (a & b).total()
    orders = [n for n in range(CHRF_ORDER) if ours[n] and theirs[n]]
    if not any(found):
        return 0.0
    precision = sum(found[n] / ours[n] for n in orders) / len(orders)
    recall = sum(found[n] / theirs[n] for n in orders) / len(orders)
    weight = CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of hypotheses that are their reference, spaces at the ends aside.

    Args, Raises: as bleu().
    """
    _check(hypotheses, references)
    return sum(h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True)) / len(hypotheses)


_ENTITIES = (("<skipped>", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_RULES = (
    (re.compile(r"""([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])"""), r" \1 "),  # every sign of ASCII but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , but inside a number
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # - after a digit
)


def tokenize_13a(text: str) -> list[str]:
    """The words BLEU counts: NIST's mteval-v13a, which sets punctuation apart and keeps case.

    >>> tokenize_13a("Hello, it's 3.5-fold.")
    ['Hello', ',', "it's", '3.5', '-', 'fold', '.']
    """
    text = text.replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, apart in _RULES:
        text = pattern.sub(apart, text)
    return text.split()


def _ngrams(items: Sequence[str], n: int) -> Counter[str | tuple[str, ...]]:
    """How often each run of n items occurs."""
    return Counter(
        items[i : i + n] if isinstance(items, str) else tuple(items[i : i + n]) for i in range(len(items) - n + 1)
    )


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses and references must be sequences of texts, got a text")
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"hypotheses and references must be as many, at least 1, got {len(hypotheses)} and {len(references)}"
        )
