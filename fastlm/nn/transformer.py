"""One block of a Transformer, pre-norm or post-norm."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module
from torch.nn.modules.module import _has_any_global_hook

from fastlm.nn import _one_call
from fastlm.nn._modules import unheard
from fastlm.nn.attention import KVCache, SelfAttention
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, RMSNorm, add_dropped, add_norm
from fastlm.ops.transformer_block import ACTIVATIONS


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


_KINDS = frozenset({LayerNorm, RMSNorm, SelfAttention, MLP, Linear, Dropout})


def _as_made(module: Module) -> bool:
    """Whether calling the module is calling its class's forward: no subclass (a parametrization makes one), no hook."""
    return type(module) in _KINDS and unheard(module)


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
        if cache is None:
            parameters = self._parameters_of_one_call(x, rope)
            if parameters is not None:
                return self._in_one_call(x, parameters, rope)
        branch = self.attention(self.norm1(x), rope, cache)
        dropout = self.dropout.p if self.dropout.training else 0.0
        y, x = add_norm(self.norm2, branch, x, dropout)  # in one pass
        return add_dropped(self.mlp(y), x, dropout)

    def _in_one_call(self, x: Tensor, parameters: list[Tensor | None], rope: tuple[Tensor, Tensor] | None) -> Tensor:
        attention, norm = self.attention, self.norm1
        layer = isinstance(norm, LayerNorm)
        return _one_call.run(
            x, parameters, rope, heads=attention.heads, kv_heads=attention.kv_heads, causal=attention.causal,
            activation=self.mlp.activation, norm="layer" if layer else "rms", eps=cast(float, norm.eps),
            attention_dropout=attention.dropout if attention.training else 0.0,
            dropout=self.dropout.p if self.dropout.training else 0.0,
        )  # fmt: skip

    def _parameters_of_one_call(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> list[Tensor | None] | None:
        """The block's parameters as ops.transformer_block takes them, or None where it would not do what the layers
        do: a layer that is another's or that somebody listens to, parameters frozen in part or of several dtypes,
        options the op has not."""
        norm1, norm2, attention, mlp = self.norm1, self.norm2, self.attention, self.mlp
        modules = (norm1, norm2, attention, attention.qkv, attention.out, mlp, mlp.up, mlp.down, self.dropout)
        if _has_any_global_hook() or not all(map(_as_made, modules)) or type(norm1) is not type(norm2):
            return None
        if norm1.eps is None or norm1.eps != norm2.eps:
            return None
        if mlp.activation not in ACTIVATIONS or attention.head_width > 256:
            return None
        if rope is not None and 2 * rope[0].shape[-1] != attention.head_width:
            return None
        if attention.dropout == 1.0 or self.dropout.p == 1.0:
            return None
        biases = (getattr(norm1, "bias", None), getattr(norm2, "bias", None))
        parameters = [
            norm1.weight, biases[0], attention.qkv.weight, attention.qkv.bias, attention.out.weight,
            attention.out.bias, norm2.weight, biases[1], mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias,
        ]  # fmt: skip
        return parameters if _one_call.fit(x, parameters) else None


class EncoderBlock(torch.nn.Module):
    """h = norm1(x + attention(x)); norm2(h + mlp(h)): the post-norm block of the first Transformer (Vaswani et al.
    2017, arXiv:1706.03762) and of BERT, over all positions at once; or as TransformerBlock with the norms before.

    Args:
        width: C.
        heads: H, dividing width.
        mlp_width, activation: as MLP.
        norm_eps: added to the variance in both LayerNorms.
        dropout: of what both branches add to the residual stream.
        attention_dropout: of attention weights; None stands for dropout.
        pre_norm: where the norms stand.

    Raises:
        ValueError: as SelfAttention and MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int | None = None,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        pre_norm: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.pre_norm = pre_norm
        self.attention = SelfAttention(width, heads, None, True, attention_dropout, False, device, dtype)
        self.norm1 = LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(width, mlp_width, activation, True, device, dtype)
        self.norm2 = LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, C) -> (B, S, C). mask (B, S) bool: False for padding, which no position sees; None: there is none.

        What stands at a padded position is finite and of no use.
        """
        dropout = self.dropout.p if self.dropout.training else 0.0
        if self.pre_norm:
            y, x = add_norm(self.norm2, self.attention(self.norm1(x), mask=mask), x, dropout)  # in one pass
            return add_dropped(self.mlp(y), x, dropout)
        x, _ = add_norm(self.norm1, self.attention(x, mask=mask), x, dropout)
        x, _ = add_norm(self.norm2, self.mlp(x), x, dropout)
        return x
