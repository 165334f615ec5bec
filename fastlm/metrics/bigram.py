"""The byte-bigram model: the next byte guessed from the last one. What any language model must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def _pairs(documents: Iterable[str]) -> np.ndarray:
    """(256, 256) counts of byte pairs within documents; a document's first byte follows a newline."""
    counts = np.zeros((256, 256), dtype=np.int64)
    for text in documents:
        data = np.frombuffer(b"\n" + text.encode(), dtype=np.uint8).astype(np.int64)
        counts += np.bincount(data[:-1] * 256 + data[1:], minlength=65536).reshape(256, 256)
    return counts


def bigram_bits_per_byte(train: Iterable[str], validation: Iterable[str], smoothing: float | None = None) -> float:
    """Bits per byte of a byte-bigram model, counted on `train`, on the text `validation`.

    p(b | a) = (n(a, b) + s) / (n(a) + 256 s).

    Args:
        smoothing: s, in counts; None tries 1, 0.1 and 0.01 and gives the best on the validation text, which favours
            the baseline.
    """
    seen, held_out = _pairs(train), _pairs(validation)
    total = int(held_out.sum())
    if total == 0:
        raise ValueError("validation must hold at least one byte")
    best = float("inf")
    for s in (1.0, 0.1, 0.01) if smoothing is None else (smoothing,):
        log_p = np.log2(seen + s) - np.log2(seen.sum(axis=1, keepdims=True) + 256 * s)
        best = min(best, float(-(held_out * log_p).sum() / total))
    return best
