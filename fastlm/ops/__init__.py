"""Every op as a function: validation, the choice of a backend, forward and backward."""

from fastlm.ops.adam import adam_step, grad_norm
from fastlm.ops.attention import attention
from fastlm.ops.attention_varlen import attention_varlen
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.dropout import dropout, dropout_add
from fastlm.ops.embedding import embedding
from fastlm.ops.gelu import gelu
from fastlm.ops.glu import geglu, swiglu
from fastlm.ops.kl_div import kl_div
from fastlm.ops.layer_norm import add_layer_norm, layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.rms_norm import add_rms_norm, rms_norm
from fastlm.ops.rope import rope
from fastlm.ops.softmax import softmax
from fastlm.ops.transformer_block import transformer_block

__all__ = [
    "adam_step",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dropout",
    "dropout_add",
    "embedding",
    "geglu",
    "gelu",
    "grad_norm",
    "kl_div",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "transformer_block",
]
