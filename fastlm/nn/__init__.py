"""Layers over fastlm.ops. Where torch.nn has the layer, ours subclasses it and changes its forward alone."""

from fastlm.nn import functional
from fastlm.nn.attention import KVCache, MultiheadAttention, SelfAttention
from fastlm.nn.decoder import CrossAttention, DecoderBlock
from fastlm.nn.embedding import Embedding
from fastlm.nn.linear import Linear
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.rotary import RotaryEmbedding
from fastlm.nn.transformer import EncoderBlock, TransformerBlock

__all__ = [
    "MLP",
    "CrossAttention",
    "CrossEntropyLoss",
    "DecoderBlock",
    "Embedding",
    "EncoderBlock",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "TransformerBlock",
    "functional",
]
