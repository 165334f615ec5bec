"""torch.nn's Transformer: its layers, their stacks and the whole, with our forward.

Vaswani et al. 2017 (arXiv:1706.03762); norm_first: Xiong et al. 2020 (arXiv:2002.04745).

A forward here stands on nothing but what torch's constructor made, so that an instance of torch's class may be given
it, and looks at its parts when it is called: a norm, a linear layer or a dropout that somebody listens to, or that is
no longer torch's, is called as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from fastlm import _dispatch
from fastlm.nn import _one_call
from fastlm.nn import functional as F
from fastlm.nn._modules import runs, unheard
from fastlm.nn.activation import GELU
from fastlm.nn.dropout import Dropout
from fastlm.nn.linear import Linear
from fastlm.nn.multihead_attention import MultiheadAttention
from fastlm.nn.norm import LayerNorm, add_dropped, add_norm

Branch = tuple[Callable[[Tensor], Tensor], Module, Module]
"""A function, its norm and its dropout."""


def _rate(dropout: Module) -> float | None:
    """The probability of a dropout that may be fused, else None."""
    if not runs(dropout, torch.nn.Dropout, Dropout) or _has_any_global_hook():
        return None
    return dropout.p if dropout.training else 0.0  # type: ignore[return-value]


def _add(x: Tensor, residual: Tensor, dropout: Module) -> Tensor:
    """residual + dropout(x)."""
    p = _rate(dropout)
    return residual + dropout(x) if p is None else add_dropped(x, residual, p)


def _add_norm(x: Tensor, residual: Tensor, dropout: Module, norm: Module) -> tuple[Tensor, Tensor]:
    """(norm(h), h), h = residual + dropout(x)."""
    p = _rate(dropout)
    if p is None or not runs(norm, torch.nn.LayerNorm, LayerNorm) or len(norm.normalized_shape) != 1:  # type: ignore[arg-type]
        h = _add(x, residual, dropout)
        return norm(h), h
    return add_norm(norm, x, residual, p)  # type: ignore[arg-type]


def _residual(x: Tensor, branches: Sequence[Branch], norm_first: bool) -> Tensor:
    """x = x + branch(norm(x)) for every branch, or x = norm(x + branch(x)): an addition and its norm in one pass."""
    if not norm_first:
        for branch, norm, dropout in branches:
            x, _ = _add_norm(branch(x), x, dropout, norm)
        return x
    y = branches[0][1](x)
    for (branch, _, dropout), (_, norm, _) in pairwise(branches):
        y, x = _add_norm(branch(y), x, dropout, norm)
    branch, _, dropout = branches[-1]
    return _add(branch(y), x, dropout)


def _attend(
    attention: Module, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor:
    return attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


def _is_linear(layer: Module) -> bool:
    return runs(layer, torch.nn.Linear, Linear) and not _has_any_global_hook()


def _activate(activation: Any, x: Tensor, ours: bool) -> Tensor:
    """activation(x); relu over x itself where that is ours alone and autograd, to which it may be a view, is off."""
    if activation is torch.nn.functional.relu:
        return torch.relu_(x) if ours and not torch.is_grad_enabled() else torch.relu(x)
    approximate = _gelu(activation)
    return activation(x) if approximate is None else F.gelu(x, approximate)


def _gelu(activation: Any) -> str | None:
    """The argument `approximate` of an activation that is gelu, else None."""
    if activation is torch.nn.functional.gelu:
        return "none"
    if isinstance(activation, torch.nn.GELU) and runs(activation, torch.nn.GELU, GELU):
        return activation.approximate
    return None


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    up, down = layer.linear1, layer.linear2
    ours = _is_linear(up)
    x = _activate(layer.activation, F.linear(x, up.weight, up.bias) if ours else up(x), ours)
    p = _rate(layer.dropout)
    x = layer.dropout(x) if p is None else F.dropout(x, p)
    return F.linear(x, down.weight, down.bias) if _is_linear(down) else down(x)


def _keeps(layer: Module, original: type[Module], *methods: str) -> bool:
    """Whether the layer's class and the layer itself leave these methods of torch's class alone. Subclasses override
    them, `_sa_block` above all to get at the attention weights."""
    kind = type(layer)
    return all(getattr(kind, m) is getattr(original, m) and m not in layer.__dict__ for m in methods)


def _constructor(original: type[Module]) -> Any:
    """The constructor of torch's class, with fastlm's layers for the torch layers it makes. They differ in their class
    alone, and so the weights are those that torch draws. What the caller gave, an activation or a stack, stays."""

    @functools.wraps(original.__init__)
    def __init__(self: Module, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        _adopt(self, given=(*args, *kwargs.values()))

    return __init__


def _adopt(module: Module, given: Sequence[object]) -> None:
    for child in module.children():
        if not any(child is argument for argument in given):
            child.__class__ = _OURS.get(type(child), type(child))
            _adopt(child, given)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer over fused attention, gelu, linear layers, dropout, and addition with norm; as
    one node of autograd where ops.transformer_block has what it asks for (norm_first, gelu, batch_first).

    Evaluation gives what training gives. Torch's fast path of evaluation, which reads float masks as bool, gives NaN
    where a query sees no key, and ignores is_causal without src_mask (refused here), is taken for short sequences
    without masks alone. Nested tensors, and a subclass with a `_sa_block` or `_ff_block` of its own, get torch's
    forward.
    """

    __init__ = _constructor(torch.nn.TransformerEncoderLayer)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch's: src (S, E), (S, B, E), or (B, S, E) with batch_first; masks as MultiheadAttention's."""
        if src.is_nested or not _keeps(self, torch.nn.TransformerEncoderLayer, "_sa_block", "_ff_block"):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src_mask is None and src_key_padding_mask is None and not is_causal and self._is_short(src):
            return super().forward(src)
        if self.norm_first and src_key_padding_mask is None and (src_mask is None) != is_causal:
            parameters = self._parameters_of_one_call(src)
            if parameters is not None:
                return self._in_one_call(src, parameters, is_causal)

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        return self._run(src, attend)

    def _is_short(self, src: Tensor) -> bool:
        """Whether torch's fast path of evaluation, one call of C++, is faster: in float32 on a CPU it takes 0.75 to
        0.97 of our time below 256 positions, and more than ours from there on. Without masks it gives the same."""
        if self.training or not src.is_cpu or src.dtype is not torch.float32 or src.dim() != 3 or src.shape[1] >= 256:
            return False
        if _dispatch._forced not in (None, "cpu") or torch.compiler.is_compiling():
            return False
        return not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())))

    def _run(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        feed_forward = functools.partial(_feed_forward, self)
        branches = (attend, self.norm1, self.dropout1), (feed_forward, self.norm2, self.dropout2)
        return _residual(x, branches, self.norm_first)

    def _parameters_of_one_call(self, src: Tensor) -> list[Tensor | None] | None:
        """The parameters as ops.transformer_block takes them, or None where it would not do what the layers do."""
        attention, norm1, norm2, up, down = self.self_attn, self.norm1, self.norm2, self.linear1, self.linear2
        if not isinstance(attention, MultiheadAttention) or not runs(attention, MultiheadAttention):
            return None
        if not attention.plain() or not attention.batch_first or attention.head_dim > 256:
            return None
        if src.dim() != 3 or src.shape[-1] != attention.embed_dim or attention.in_proj_weight is None:
            return None
        if not all(runs(norm, torch.nn.LayerNorm, LayerNorm) for norm in (norm1, norm2)) or norm1.eps != norm2.eps:
            return None
        rate = _rate(self.dropout1)
        if rate in (None, 1.0) or _rate(self.dropout2) != rate or _rate(self.dropout) != 0.0:
            return None
        if _gelu(self.activation) is None or not (_is_linear(up) and _is_linear(down)):
            return None
        parameters: list[Tensor | None] = [
            norm1.weight, norm1.bias, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
            attention.out_proj.bias, norm2.weight, norm2.bias, up.weight, up.bias, down.weight, down.bias,
        ]  # fmt: skip
        return parameters if _one_call.fit(src, parameters) else None

    def _in_one_call(self, src: Tensor, parameters: list[Tensor | None], is_causal: bool) -> Tensor:
        attention = self.self_attn
        return _one_call.run(
            src, parameters, heads=attention.num_heads, causal=is_causal, eps=self.norm1.eps,
            activation="gelu" if _gelu(self.activation) == "none" else "gelu_tanh",
            attention_dropout=attention.dropout if attention.training else 0.0, dropout=_rate(self.dropout1),
        )  # fmt: skip

    def _packs(self) -> bool:
        """Whether _run() may be called in place of the layer, on the real positions of a batch alone."""
        attention = self.self_attn
        return (
            isinstance(attention, MultiheadAttention) and runs(attention, MultiheadAttention) and attention.plain()
            and runs(self, TransformerEncoderLayer) and all(map(unheard, self.modules())) and not _has_any_global_hook()
            and _keeps(self, torch.nn.TransformerEncoderLayer, "_sa_block", "_ff_block")
        )  # fmt: skip


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer over fused attention, gelu, linear layers, dropout, and addition with norm.

    A subclass with a `_sa_block`, `_mha_block` or `_ff_block` of its own gets torch's forward.
    """

    __init__ = _constructor(torch.nn.TransformerDecoderLayer)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's: tgt (T, E), (T, B, E), or (B, T, E) with batch_first; memory the same with S; masks as
        MultiheadAttention's."""
        if not _keeps(self, torch.nn.TransformerDecoderLayer, "_sa_block", "_mha_block", "_ff_block"):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def cross(x: Tensor) -> Tensor:
            return _attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        feed_forward = functools.partial(_feed_forward, self)
        branches = (
            (attend, self.norm1, self.dropout1),
            (cross, self.norm2, self.dropout2),
            (feed_forward, self.norm3, self.dropout3),
        )
        return _residual(tgt, branches, self.norm_first)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder whose layers run as fastlm's.

    In evaluation torch turns a padded batch into a nested tensor where it can (enable_nested_tensor, masks that pad on
    the right, no src_mask, no gradient) and returns zeros at padded positions, before the final norm. So does this, and
    computes real positions alone. A stack with layers of another class gets torch's forward.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch's; is_causal None looks whether mask is the causal one, but not under torch.compile."""
        if src.is_nested or not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        drops = self._drops_padding(src, mask, src_key_padding_mask)
        if drops and all(layer._packs() for layer in self.layers):
            x = self._packed(src, ~src_key_padding_mask)  # type: ignore[operator]
        else:
            x, is_causal = src, _is_causal(mask, is_causal)
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
            if drops:
                x = x.masked_fill(src_key_padding_mask.unsqueeze(-1), 0.0)  # type: ignore[union-attr]
        return x if self.norm is None else self.norm(x)

    def _packed(self, src: Tensor, real: Tensor) -> Tensor:
        """The layers over the real positions of src (B, S, E), one sequence behind the other; zeros elsewhere."""
        lengths = real.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest, x = int(lengths.max()), src[real]  # (positions, E)
        for layer in self.layers:
            x = layer._run(x, functools.partial(layer.self_attn.packed, cu_seqlens=cu_seqlens, longest=longest))
        out = torch.zeros_like(src)
        out[real] = x
        return out

    def _drops_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """Whether torch would make a nested tensor of src: its conditions."""
        if padding is None or mask is not None or padding.dtype is not torch.bool or src.dim() != 3 or not src.numel():
            return False
        first = self.layers[0]
        if first.training or not self.use_nested_tensor or not torch.backends.mha.get_fastpath_enabled():
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters())):
            return False
        if torch.is_autocast_enabled():
            return False
        if not self.mask_check:
            return True
        if torch.compiler.is_compiling():
            return False
        return not bool((padding[:, 1:] < padding[:, :-1]).any())


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder, whole under torch.compile."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's; tgt_is_causal None looks whether tgt_mask is the causal one, but not under torch.compile."""
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            _is_causal(tgt_mask, tgt_is_causal), memory_is_causal,
        )  # fmt: skip


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer of fastlm's encoder and decoder; custom ones stay as they were given."""

    __init__ = _constructor(torch.nn.Transformer)


def _is_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """The hint, else whether mask is the causal one, bool or -inf. A stack looks once for all its layers."""
    if hint is not None or mask is None:
        return bool(hint)
    S = mask.shape[-1]
    if mask.shape != (S, S) or torch.compiler.is_compiling():
        return False
    later = torch.ones((S, S), dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype is torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, float("-inf")))


_OURS: dict[type[Module], type[Module]] = {
    torch.nn.Dropout: Dropout,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Linear: Linear,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
}
