"""fastlm.nn's layers as patch() puts them into a model: on a CPU they leave to torch the calls that it serves faster.

Those are small ones, whose time is that of the way to the kernel, and some in float32. The limits are numbers of a
call's input, measured on two cores with AVX-512 and AMX against torch 2.13, forward alone and with backward: from there
on fastlm's takes no longer (0.97 to 6 times as fast).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlm.nn
from fastlm.nn._modules import same_as

NEVER = 1 << 62
GLU, GELU_TANH = 1 << 15, 1 << 13
_LAYER_NORM, RMS_NORM, _LOSS = 1 << 18, 1 << 12, 1 << 19
_ATTENTION, _ATTENTION_ALONE = 1 << 14, 1 << 18  # torch has fast paths of its own for evaluation without gradients
_HALF = (torch.bfloat16, torch.float16)


def few(x: Tensor, limit: int) -> bool:
    """Whether a call with this input is one that torch serves faster."""
    return x.is_cpu and x.numel() < limit


def takes(x: Any) -> bool:
    """Whether fastlm's ops take the tensor: no nested or sharded one, nor under torch.func's transforms."""
    return (
        type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not x.is_nested
        and x.layout is torch.strided and not torch._C._are_functorch_transforms_active()
    )  # fmt: skip


def torch_s(x: Any, limit: int = 0) -> bool:
    """Whether to leave a call with this input to torch."""
    return not takes(x) or few(x, limit)


class LayerNorm(fastlm.nn.LayerNorm):
    """torch's on a CPU but for long inputs in half types: 1.2 to 1.9 times as fast there, the same time in float32."""

    def forward(self, input: Tensor) -> Tensor:
        if torch_s(input, _LAYER_NORM if input.dtype in _HALF else NEVER):
            return nn.LayerNorm.forward(self, input)
        return super().forward(input)


class RMSNorm(fastlm.nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if torch_s(x, RMS_NORM):
            return nn.RMSNorm.forward(self, x)
        return super().forward(x)


class GELU(fastlm.nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        if torch_s(input, gelu_limit(input, self.approximate == "tanh")):
            return nn.GELU.forward(self, input)
        return super().forward(input)


def gelu_limit(x: Tensor, tanh: bool) -> int:
    """Exact GELU in float32 is torch's where no gradient is asked for."""
    if tanh:
        return GELU_TANH
    return NEVER if x.dtype is torch.float32 and not torch.is_grad_enabled() else 0


class CrossEntropyLoss(fastlm.nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if torch_s(input, _LOSS):
            return nn.CrossEntropyLoss.forward(self, input, target)
        return super().forward(input, target)


def _attention_limit() -> int:
    return _ATTENTION if torch.is_grad_enabled() else _ATTENTION_ALONE


class MultiheadAttention(fastlm.nn.MultiheadAttention):
    @same_as(fastlm.nn.MultiheadAttention)
    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if torch_s(query, _attention_limit()):
            return nn.MultiheadAttention.forward(self, query, *args, **kwargs)
        return super().forward(query, *args, **kwargs)


class TransformerEncoderLayer(fastlm.nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch_s(src, _attention_limit()):
            return nn.TransformerEncoderLayer.forward(self, src, *args, **kwargs)
        return super().forward(src, *args, **kwargs)


class TransformerDecoderLayer(fastlm.nn.TransformerDecoderLayer):
    def forward(self, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch_s(tgt, _ATTENTION):
            return nn.TransformerDecoderLayer.forward(self, tgt, *args, **kwargs)
        return super().forward(tgt, *args, **kwargs)
