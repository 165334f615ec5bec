"""The decoder's half of an encoder-decoder Transformer: attention to another sequence, and the block around it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn.attention import KVCache, SelfAttention, attention_maps
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, add_dropped, add_norm


class CrossAttention(torch.nn.Module):
    """out(attention(q, k, v)), q a projection of x, k and v of another sequence (Vaswani et al. 2017, arXiv:1706.03762,
    section 3.2.3).

    Args:
        width: C, of both sequences and of the output; a multiple of heads.
        heads: H.
        dropout: probability of dropping an attention weight while training.

    Raises:
        ValueError: heads do not divide width, dropout not in [0, 1].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width must be a positive multiple of heads, got width={width}, heads={heads}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.heads, self.dropout = heads, dropout
        self.q = torch.nn.Linear(width, width, True, device, dtype)
        self.kv = torch.nn.Linear(width, 2 * width, True, device, dtype)
        self.out = torch.nn.Linear(width, width, True, device, dtype)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, H, T, D) of the sequence attended to, (B, T, C); a decoder computes them once for all steps."""
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, T, H, D) each, views
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (N, S, C) -> (N, S, C).

        Args:
            x: N may be a multiple of B: the first N / B rows then see the first of the B sequences, and so on (beams
                of one source, whose keys are not repeated).
            k, v: (B, H, T, D), of keys_values().
            mask: (B, T) bool, False for keys that nobody sees; None: all are seen.
        """
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
        dropout = self.dropout if self.training else 0.0
        out = ops.attention(self._queries(x, k), k, v, mask=seen, dropout=dropout)  # (B, H, N / B * S, D)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    def maps(self, x: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights (B, H, N / B * S, T) that forward() gives the values, without dropout: see attention_maps()."""
        return attention_maps(self._queries(x, k), k, None if mask is None else mask[:, None, None])

    def _queries(self, x: Tensor, k: Tensor) -> Tensor:
        B, H, _, D = k.shape
        return self.q(x).view(B, -1, H, D).transpose(1, 2)  # (B, H, N / B * S, D)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"


class DecoderBlock(torch.nn.Module):
    """Causal attention to itself, attention to the encoder's output, MLP.

    Post-norm (Vaswani et al. 2017): x = norm(x + branch(x)) three times. Pre-norm (Xiong et al. 2020,
    arXiv:2002.04745): x = x + branch(norm(x)).

    Args:
        width: C.
        heads: H, dividing width.
        mlp_width, activation: as MLP.
        norm_eps: added to the variance in the LayerNorms.
        dropout: of what the branches add to the residual stream.
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
        self.attention = SelfAttention(width, heads, None, True, attention_dropout, True, device, dtype)
        self.norm1 = LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.cross = CrossAttention(width, heads, attention_dropout, device, dtype)
        self.norm2 = LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(width, mlp_width, activation, True, device, dtype)
        self.norm3 = LayerNorm(width, norm_eps, device=device, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        maps: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> Tensor:
        """x (N, S, C) -> (N, S, C).

        Args:
            keys_values: (B, H, T, D) each, self.cross.keys_values(the encoder's output); N as CrossAttention.
            mask: (B, T) bool, False for padding of the source.
            cache: earlier keys and values of the attention to itself.
            maps: the weights of the attention to itself and to the other sequence are appended to these two.
        """
        dropout = self.dropout.p if self.dropout.training else 0.0
        y = self.norm1(x) if self.pre_norm else x
        if maps is not None:
            maps[0].append(self.attention.maps(y))
        branch = self.attention(y, cache=cache)
        y, h = add_norm(self.norm2 if self.pre_norm else self.norm1, branch, x, dropout)  # in one pass
        if maps is not None:
            maps[1].append(self.cross.maps(y, keys_values[0], mask))
        branch = self.cross(y, *keys_values, mask)
        if self.pre_norm:
            y, h = add_norm(self.norm3, branch, h, dropout)
            return add_dropped(self.mlp(y), h, dropout)
        y, _ = add_norm(self.norm2, branch, y, dropout)
        return add_norm(self.norm3, self.mlp(y), y, dropout)[0]
