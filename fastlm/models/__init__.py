"""Complete language models."""

from fastlm.models.causal_lm import CausalLM, CausalLMConfig, CausalLMOutput
from fastlm.models.masked_lm import MaskedLM, MaskedLMConfig, MaskedLMOutput

__all__ = ["CausalLM", "CausalLMConfig", "CausalLMOutput", "MaskedLM", "MaskedLMConfig", "MaskedLMOutput"]
