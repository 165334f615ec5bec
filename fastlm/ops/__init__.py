"""Every op as a function: validation, the choice of a backend, forward and backward."""

from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.layer_norm import add_layer_norm, layer_norm
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["add_layer_norm", "cross_entropy", "layer_norm", "linear_cross_entropy"]
