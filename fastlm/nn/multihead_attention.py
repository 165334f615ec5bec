"""MultiheadAttention: torch's layer with our forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn import functional as F


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with fused attention where no attention weights are asked for (Vaswani et al. 2017,
    arXiv:1706.03762).

    Torch's own forward serves need_weights=True (torch's default), whose S x T weights a fused kernel never holds,
    add_bias_kv, add_zero_attn, nested tensors, and what torch refuses. Training and evaluation run the same code, and
    give what torch gives in training: its fast path of evaluation reads float masks as bool and gives NaN for a query
    that sees no key, where this gives the bias of the output projection. With weights torch gives NaN in both.
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
        """As torch's. In both masks bool True means *left out*, the opposite of scaled_dot_product_attention.

        Args:
            query: (S, E), (S, B, E), or (B, S, E) with batch_first; key: the same with T and kdim; value: with T and
                vdim.
            key_padding_mask: (T,) or (B, T), bool or added to the scores.
            attn_mask: (S, T) or (B * H, S, T), bool or added to the scores. Float masks may require a gradient.
            is_causal: says that attn_mask is the causal mask. It is then not read, with key_padding_mask neither: the
                kernel leaves out what the hint says.

        Returns:
            The output in the layout of query, and None in place of weights that were not asked for.

        Raises:
            What torch raises in training; RuntimeError for is_causal without attn_mask, which its fast path ignores.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask must be given with is_causal, which says that it is the causal mask; got None"
            )
        if need_weights or not self._fits(query, key, value, key_padding_mask, attn_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:  # (S, E) -> (1, S, E)
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:  # (S, B, E) -> (B, S, E), a view
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = _merge_masks(None if is_causal else attn_mask, key_padding_mask, q.shape[0], self.num_heads)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, length, D)
        out = ops.attention(q, k, v, mask=mask, causal=is_causal, dropout=self.dropout if self.training else 0.0)
        out = out.transpose(1, 2).flatten(2)  # (B, S, E)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def packed(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Self-attention of sequences one behind the other: x (positions, E), cu_seqlens (B + 1,) int32 from where to
        where each goes."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self._project(x, x, x))  # (positions, H, D)
        dropout = self.dropout if self.training else 0.0
        out = ops.attention_varlen(q, k, v, cu_seqlens, max_seqlen_q=longest, dropout=dropout)
        return F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def plain(self) -> bool:
        """Whether it attends to nothing but what it is given, and drops less than everything."""
        added = self.bias_k is not None or self.bias_v is not None or self.add_zero_attn
        return not added and not (self.training and self.dropout == 1.0)

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether our path takes the call; where not, torch's does, or says what is wrong."""
        if not self.plain():
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
        if attn_mask is not None:
            allowed = ((S, T), (B * self.num_heads, S, T))
            if tuple(attn_mask.shape) not in allowed or not _is_mask(attn_mask):
                return False
        if key_padding_mask is None:
            return True
        return tuple(key_padding_mask.shape) == ((T,) if batch is None else (B, T)) and _is_mask(key_padding_mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., E), k, v; one matrix product where query is key is value, two where key is value."""
        E, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).split(E, -1)
            return q, k, v
        w, b = self.in_proj_weight.split((E, 2 * E)), (None, None) if bias is None else bias.split((E, 2 * E))
        q = F.linear(query, w[0], b[0])
        if key is value:
            k, v = F.linear(key, w[1], b[1]).split(E, -1)
            return q, k, v
        (wk, wv), (bk, bv) = w[1].split(E), (None, None) if b[1] is None else b[1].split(E)
        return q, F.linear(key, wk, bk), F.linear(value, wv, bv)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype is torch.bool or mask.is_floating_point()


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, B: int, H: int) -> Tensor | None:
    """torch.nn.MultiheadAttention's two masks as scaled_dot_product_attention's one, broadcastable to (B, H, S, T)."""
    if attn_mask is not None and attn_mask.dim() == 3:  # (B * H, S, T)
        attn_mask = attn_mask.unflatten(0, (B, H))
    if padding is not None:
        padding = padding.view(B, 1, 1, padding.shape[-1])
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
