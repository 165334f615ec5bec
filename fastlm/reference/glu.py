"""forward() and backward() of glu (swiglu, geglu) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference import wide
from fastlm.reference.gelu import gelu


def activate(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gate's activation, "silu", "gelu" or "gelu_tanh", and its derivative, in the dtype of x."""
    if activation != "silu":
        return gelu(x, activation == "gelu_tanh")
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    a, b = gate.chunk(2, -1) if up is None else (gate, up)
    return (activate(wide(a), activation)[0] * wide(b)).to(gate.dtype).contiguous()


def backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    a, b = gate.chunk(2, -1) if up is None else (gate, up)
    value, slope = activate(wide(a), activation)
    dgate, dup = (wide(dy) * wide(b) * slope).to(gate.dtype), (wide(dy) * value).to(gate.dtype)
    if up is None:
        return torch.cat((dgate, dup), -1), gate.new_empty(0)
    return dgate.contiguous(), dup.contiguous()
