"""Complete language models."""

from fastlm.models.causal_lm import CausalLM, CausalLMConfig, CausalLMOutput
from fastlm.models.masked_lm import MaskedLM, MaskedLMConfig, MaskedLMOutput
from fastlm.models.seq2seq_lm import Seq2SeqAttention, Seq2SeqLM, Seq2SeqLMConfig, Seq2SeqLMOutput
from fastlm.models.word_vectors import load_word_vectors

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "CausalLMOutput",
    "MaskedLM",
    "MaskedLMConfig",
    "MaskedLMOutput",
    "Seq2SeqAttention",
    "Seq2SeqLM",
    "Seq2SeqLMConfig",
    "Seq2SeqLMOutput",
    "load_word_vectors",
]
