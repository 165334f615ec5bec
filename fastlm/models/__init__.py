"""Complete language models."""

from fastlm.models.causal_lm import CausalLM, CausalLMConfig, CausalLMOutput

__all__ = ["CausalLM", "CausalLMConfig", "CausalLMOutput"]
