"""Perplexity and bits per byte from a sum of negative log-likelihoods."""

from __future__ import annotations

import math


def perplexity(mean_loss: float) -> float:
    """exp(loss): between how many tokens the model is, on average, undecided. Loss in nats per token."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bits_per_byte(total_loss: float, count: int) -> float:
    """Bits spent on each byte of the text; unlike perplexity it does not depend on the tokenizer.

    Args:
        total_loss: negative log-likelihood of the whole text, in nats.
        count: UTF-8 bytes of the text.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 byte, got {count}")
    return total_loss / math.log(2) / count
