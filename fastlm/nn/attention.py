"""The self-attention of our own models, its cache, and the weights that attention gives."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn.rotary import rotate


def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask), the weights that attention gives the values: to look at, not to train fast.

    No kernel ever holds them; the reference does, which makes this O(S T) in memory and warns of it.

    Args:
        q: (B, H, S, D). k: (B, Hk, T, D).
        mask, causal: as fastlm.ops.attention.

    Returns:
        (B, H, S, T), dtype of q, differentiable.
    """
    B, H, S, _ = q.shape
    Hk, T = k.shape[1:3]
    held = B * H * S * T * q.element_size() / 1e6
    warnings.warn(
        f"attention maps are O(S^2): {held:.1f} MB for this layer's {B} x {H} x {S} x {T} weights, by the reference",
        stacklevel=2,
    )
    identity = torch.eye(T, dtype=q.dtype, device=q.device).expand(B, Hk, T, T)  # weights times it are the weights
    return ops.attention(q, k, identity, mask=mask, causal=causal, backend="reference")


class KVCache:
    """Keys and values of one layer, (B, Hk, context, D) each, allocated once and filled from the left.

    Args:
        context: the most positions it holds.
    """

    def __init__(self, context: int) -> None:
        self.context = context
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v (B, Hk, S, D) and returns all so far: views (B, Hk, length, D).

        Raises:
            ValueError: more positions than the cache holds.
        """
        B, H, S, D = k.shape
        start, end = self.length, self.length + S
        if end > self.context:
            raise ValueError(f"the cache holds {self.context} positions, got {S} more after {start}")
        if self._keys is None or self._values is None:
            self._keys = k.new_empty((B, H, self.context, D))
            self._values = v.new_empty((B, H, self.context, v.shape[-1]))
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Row i of the batch goes on from what row rows[i] was; rows (B,) int64 (beams that survive)."""
        if self._keys is not None and self._values is not None:
            for kept in (self._keys, self._values):
                kept[:, :, : self.length] = kept[:, :, : self.length].index_select(0, rows)


class SelfAttention(torch.nn.Module):
    """out(attention(q, k, v)) with q, k, v from one projection of x (Vaswani et al. 2017, arXiv:1706.03762).

    With kv_heads < heads each key/value head serves heads / kv_heads query heads (Ainslie et al. 2023,
    arXiv:2305.13245).

    Args:
        width: C, of input and output; a multiple of heads.
        heads, kv_heads: H and Hk, the second dividing the first; None stands for heads.
        bias: whether both projections have one.
        dropout: probability of dropping an attention weight while training.
        causal: position s sees positions 0 to s.

    Raises:
        ValueError: heads do not divide width, kv_heads do not divide heads, dropout not in [0, 1].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width must be a positive multiple of heads, got width={width}, heads={heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads}, heads={heads}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.dropout, self.causal = dropout, causal
        self.qkv = torch.nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias, device, dtype)
        self.out = torch.nn.Linear(width, width, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, S, C) -> (B, S, C).

        Args:
            rope: (cos, sin) of these S positions, from RotaryEmbedding; None for no rotation.
            cache: earlier keys and values, to which those of x are added; queries then see all of them (causally).
            mask: (B, T) bool, False for keys that nobody sees; T counts those of the cache. None: all are seen.
        """
        B, S, C = x.shape
        q, k, v = self._project(x, rope)
        causal: Literal["bottom-right"] | bool = self.causal
        if cache is not None:
            k, v = cache.append(k, v)
            causal = "bottom-right" if self.causal and S > 1 else False  # a single query is the last: it sees all
        dropout = self.dropout if self.training else 0.0
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
        out = ops.attention(q, k, v, mask=seen, causal=causal, dropout=dropout)  # (B, H, S, D)
        return self.out(out.transpose(1, 2).reshape(B, S, C))

    def maps(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """The weights (B, H, S, S) that forward() gives the values of x, without dropout: see attention_maps()."""
        q, k, _ = self._project(x, rope)
        return attention_maps(q, k, None if mask is None else mask[:, None, None], self.causal)

    def _project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, S, D), k and v (B, Hk, S, D), q and k rotated."""
        B, S, _ = x.shape
        H, Hk, D = self.heads, self.kv_heads, self.head_width
        q, k, v = self.qkv(x).split((H * D, Hk * D, Hk * D), -1)  # (B, S, H*D), (B, S, Hk*D) twice: views
        q = q.view(B, S, H, D).transpose(1, 2)  # (B, H, S, D), no copy: the kernels take strides
        k = k.view(B, S, Hk, D).transpose(1, 2)
        v = v.view(B, S, Hk, D).transpose(1, 2)
        return (q, k, v) if rope is None else (*rotate(q, k, *rope), v)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, dropout={self.dropout}, causal={self.causal}"
