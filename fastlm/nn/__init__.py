"""torch.nn over fastlm.ops: `from fastlm import nn` in place of `from torch import nn`.

Where torch.nn has the layer, ours subclasses it and changes its forward alone. What is not here is torch.nn's own.
"""

from typing import Any

import torch

from fastlm.nn import functional
from fastlm.nn.activation import GELU, LogSoftmax, Softmax
from fastlm.nn.attention import KVCache, SelfAttention
from fastlm.nn.decoder import CrossAttention, DecoderBlock
from fastlm.nn.dropout import Dropout
from fastlm.nn.embedding import Embedding
from fastlm.nn.encoder_decoder import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastlm.nn.linear import Linear
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.mlp import MLP
from fastlm.nn.multihead_attention import MultiheadAttention
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.rotary import RotaryEmbedding
from fastlm.nn.transformer import EncoderBlock, TransformerBlock

__all__ = [
    "GELU",
    "MLP",
    "CrossAttention",
    "CrossEntropyLoss",
    "DecoderBlock",
    "Dropout",
    "Embedding",
    "EncoderBlock",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "Softmax",
    "Transformer",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(torch.nn)})
