"""One block of a Transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.nn.attention import KVCache, SelfAttention
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, RMSNorm, add_norm


def make_norm(
    kind: str,
    width: int,
    eps: float = 1e-5,
    bias: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LayerNorm | RMSNorm:
    """A LayerNorm ("layer", the only one with a bias) or an RMSNorm ("rms") over the last dimension.

    Raises:
        ValueError: another kind.
    """
    if kind == "layer":
        return LayerNorm(width, eps, bias=bias, device=device, dtype=dtype)
    if kind == "rms":
        return RMSNorm(width, eps, device=device, dtype=dtype)
    raise ValueError(f"norm must be 'layer' or 'rms', got {kind!r}")


class TransformerBlock(torch.nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h)): the pre-norm block (Xiong et al. 2020, arXiv:2002.04745).

    Args:
        width: C.
        heads, kv_heads, causal: as SelfAttention.
        mlp_width, activation: as MLP.
        norm: "layer" or "rms"; norm_eps is added to the variance or mean square.
        bias: of the four projections and of LayerNorm.
        dropout: of attention weights and of what both branches add to the residual stream.

    Raises:
        ValueError: as SelfAttention and MLP; an unknown norm.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        activation: str = "gelu",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width, norm_eps, bias, device, dtype)
        self.attention = SelfAttention(width, heads, kv_heads, bias, dropout, causal, device, dtype)
        self.norm2 = make_norm(norm, width, norm_eps, bias, device, dtype)
        self.mlp = MLP(width, mlp_width, activation, bias, device, dtype)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None) -> Tensor:
        """x (B, S, C) -> (B, S, C); rope and cache as SelfAttention."""
        branch = self.attention(self.norm1(x), rope, cache)
        y, x = add_norm(self.norm2, branch, x, self.dropout.p if self.dropout.training else 0.0)  # in one pass
        return x + self.dropout(self.mlp(y))
