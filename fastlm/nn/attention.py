"""Attention layers: torch's MultiheadAttention with our forward, and the self-attention of our own models."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn import functional as F
from fastlm.nn.rotary import rotate


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with fused attention where no attention weights are asked for.

    need_weights=True (torch's default) returns the S x T weights, which a fused kernel never holds, so that call, and
    add_bias_kv, add_zero_attn and arguments torch refuses, go to torch's own forward. Vaswani et al. 2017
    (arXiv:1706.03762).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's. In both masks bool True means *left out*, the opposite of scaled_dot_product_attention."""
        if need_weights or not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:  # (S, E) -> (1, S, E)
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:  # (S, B, E) -> (B, S, E), a view
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        # As in torch: with key padding the hint is not used, the mask it stands for is.
        hint = is_causal and key_padding_mask is None
        mask = _merge_masks(None if hint else attn_mask, key_padding_mask, q.shape[0], self.num_heads)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, length, D)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=hint,
        )
        out = out.transpose(1, 2).flatten(2)  # (B, S, E)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return torch.nn.functional.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether our path takes the call; where not, torch's does, or says what is wrong."""
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return False
        inputs = (query, key, value)
        dims = query.dim()
        if dims not in (2, 3) or any(t.is_nested or t.dim() != dims for t in inputs):
            return False
        if any(t.shape[-1] != w for t, w in zip(inputs, (self.embed_dim, self.kdim, self.vdim), strict=True)):
            return False
        length, batch = (0, None) if dims == 2 else (1, 0) if self.batch_first else (0, 1)
        if key.shape[length] != value.shape[length]:
            return False
        B = 1 if batch is None else query.shape[batch]
        if batch is not None and (key.shape[batch] != B or value.shape[batch] != B):
            return False
        S, T = query.shape[length], key.shape[length]
        if is_causal and attn_mask is None:
            return False  # torch: "need attn_mask if specifying the is_causal hint"
        if attn_mask is not None:
            allowed = ((S, T), (B * self.num_heads, S, T))
            if tuple(attn_mask.shape) not in allowed or not _is_mask(attn_mask):
                return False
        if key_padding_mask is None:
            return True
        return tuple(key_padding_mask.shape) == ((T,) if batch is None else (B, T)) and _is_mask(key_padding_mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., E), k, v; one matrix product where query is key is value, two where key is value."""
        linear, E, bias = torch.nn.functional.linear, self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        if query is key and key is value:
            q, k, v = linear(query, self.in_proj_weight, bias).split(E, -1)
            return q, k, v
        w, b = self.in_proj_weight.split((E, 2 * E)), (None, None) if bias is None else bias.split((E, 2 * E))
        q = linear(query, w[0], b[0])
        if key is value:
            k, v = linear(key, w[1], b[1]).split(E, -1)
            return q, k, v
        (wk, wv), (bk, bv) = w[1].split(E), (None, None) if b[1] is None else b[1].split(E)
        return q, linear(key, wk, bk), linear(value, wv, bv)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype is torch.bool or mask.is_floating_point()


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, B: int, H: int) -> Tensor | None:
    """torch.nn.MultiheadAttention's two masks as scaled_dot_product_attention's one, broadcastable to (B, H, S, T)."""
    if attn_mask is not None and attn_mask.dim() == 3:  # (B * H, S, T)
        attn_mask = attn_mask.unflatten(0, (B, H))
    if padding is not None:
        padding = padding.view(B, 1, 1, -1)
    masks = [mask for mask in (attn_mask, padding) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype is torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    minus_infinity = float("-inf")
    added = [
        torch.zeros_like(m, dtype=torch.float32).masked_fill_(m, minus_infinity) if m.dtype is torch.bool else m
        for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


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
