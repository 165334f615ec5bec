"""Figures that say how well a language model predicts, and the baseline they are held against."""

from fastlm.metrics.bigram import bigram_bits_per_byte
from fastlm.metrics.likelihood import bits_per_byte, perplexity

__all__ = ["bigram_bits_per_byte", "bits_per_byte", "perplexity"]
