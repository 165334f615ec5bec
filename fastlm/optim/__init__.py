"""Optimizers that subclass torch.optim's: same arguments, groups and state dicts, one fused call a step."""

from fastlm.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
