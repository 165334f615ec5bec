"""LayerNorm and RMSNorm: torch's layers with our forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, run by fastlm.ops.layer_norm (Ba et al. 2016, arXiv:1607.06450)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, run by fastlm.ops.rms_norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def add_norm(
    norm: torch.nn.LayerNorm | torch.nn.RMSNorm, x: Tensor, residual: Tensor, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """h = dropout(x) + residual, y = norm(h), in one pass over memory where both have one dtype.

    Args:
        norm: a layer that normalises the last dimension alone.
        x: (..., N), the output of a branch; under autocast bfloat16 beside a float32 residual stream.
        residual: (..., N), the residual stream.
        dropout: probability in [0, 1] that an element of x is dropped.

    Returns:
        (y, h), h in the dtype torch promotes x and residual to.
    """
    if x.dtype is not residual.dtype or dropout == 1.0:
        h = add_dropped(x, residual, dropout)
        return norm(h), h
    if isinstance(norm, torch.nn.LayerNorm):
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout=dropout)
    return ops.add_rms_norm(x, residual, norm.weight, norm.eps, dropout=dropout)


def add_dropped(x: Tensor, residual: Tensor, dropout: float) -> Tensor:
    """residual + dropout(x); on the CPU in one pass, because torch's generator there is serial."""
    if residual.is_cpu and 0.0 < dropout < 1.0:
        return ops.dropout_add(x, residual.to(torch.promote_types(x.dtype, residual.dtype)), dropout)
    return residual + torch.nn.functional.dropout(x, dropout)
