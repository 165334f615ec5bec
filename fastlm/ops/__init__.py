"""Every op as a function: validation, the choice of a backend, forward and backward."""

from fastlm.ops.layer_norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
