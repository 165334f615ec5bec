"""Figures that say how well a model predicts, and the baselines they are held against."""

from fastlm.metrics.bigram import bigram_bits_per_byte
from fastlm.metrics.classification import ClassScores, accuracy, class_scores, confusion, macro_f1, majority_accuracy
from fastlm.metrics.likelihood import bits_per_byte, perplexity
from fastlm.metrics.spans import span_scores, spans
from fastlm.metrics.translation import bleu, chrf, exact_match

__all__ = [
    "ClassScores",
    "accuracy",
    "bigram_bits_per_byte",
    "bits_per_byte",
    "bleu",
    "chrf",
    "class_scores",
    "confusion",
    "exact_match",
    "macro_f1",
    "majority_accuracy",
    "perplexity",
    "span_scores",
    "spans",
]
