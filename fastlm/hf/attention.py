"""attn_implementation="fastlm": ops.attention as an attention function of transformers, and the mask function it needs.

Importing this registers both. An attention without a mask function would get no mask at all, padding included, and a
name with "flash" in it would be taken for one of flash-attn's.
"""

from __future__ import annotations

import inspect
import weakref
from functools import cache
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from fastlm import ops
from fastlm.hf import _masks
from fastlm.hf._linear import swap_linears
from fastlm.hf._masks import Pattern, pattern_of
from fastlm.nn._autocast import autocast_dtype, lower
from fastlm.ops.attention import Causal
from fastlm.patching import STATE, Report

NAME = "fastlm"
_BEFORE = f"{STATE}attention"
_LARGEST_HEAD = 256


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    output_attentions: bool | None = False,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What AttentionInterface calls: softmax(scaling * q k^T + mask) v.

    Args:
        module: the layer. Where is_causal is None, its own says whether a call without a mask is causal; one query
            never is.
        query: (B, H, S, D); key: (B, Hk, T, D), value: (B, Hk, T, Dv), not repeated. A batch of 1 is expanded.
        attention_mask: of our mask function, or any tensor broadcastable to (B, H, S, T): bool, or added.
        dropout, scaling, softcap: as in ops.attention. s_aux is its sinks.
        sliding_window: how many keys a query sees, its own included, where the mask does not say it.
        position_bias: (1 or B, H, S, T), added to the logits and differentiable (T5).
        position_ids: (B, S), looked at for documents that nothing keeps apart.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed one behind the other in (B * S), as
            of DataCollatorWithFlattening(return_flash_attn_kwargs=True).
        output_attentions: there are no weights to give: a warning, as of sdpa.
        cache: of continuous batching.

    Returns:
        (B, S, H, Dv), and None. A query that sees no key gives 0, as with sdpa; eager gives the mean of all values.

    Raises:
        NotImplementedError: a paged cache.
    """
    if cache is not None:
        raise NotImplementedError('attn_implementation="fastlm" has no paged cache: use "sdpa" for continuous batching')
    if output_attentions:
        _warn(module, 'attn_implementation="fastlm" gives no attention weights: use "eager" for output_attentions=True')
    dtype = autocast_dtype(query.device)
    query, key, value = (lower(t, dtype) for t in (query, key, value))  # type: ignore[assignment]
    b, s, t = max(query.shape[0], key.shape[0]), query.shape[2], key.shape[2]
    pattern = _pattern(module, attention_mask, is_causal, sliding_window, b, s, t)
    if pattern is not None:
        attention_mask = None
    # Cross-attention gets the decoder's lengths as well, which are not those of its keys.
    varlen = cu_seq_lens_q is not None and s == t and position_bias is None and pattern is not None and _apart(pattern)
    if not varlen and pattern is not None and s > 1:
        _look_for_leaks(module, pattern, position_ids)
    options: dict[str, Any] = {"softcap": softcap, "sinks": s_aux, "scale": scaling, "dropout": dropout}
    if varlen:
        assert cu_seq_lens_q is not None and pattern is not None
        out = _packed(query, key, value, pattern, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options)
        return out, None
    if query.shape[0] != key.shape[0]:
        query, key, value = (x.expand(b, -1, -1, -1) for x in (query, key, value))
    if pattern is not None:
        options |= {"causal": pattern.causal, "window": pattern.window, "documents": pattern.documents}
    out = ops.attention(query, key, value, mask=_with_bias(attention_mask, position_bias), **options)
    return out.transpose(1, 2).contiguous(), None


def _pattern(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None, sliding_window: int | None, b: int, s: int, t: int
) -> Pattern | None:
    """The call's mask as options; None where it has to be read as it is."""
    if mask is None:
        # As sdpa: the first query stands at the first key (a cache may have room left), but one alone sees all of them.
        if s == 1:
            return Pattern()
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        side = None if sliding_window is None else sliding_window - 1
        return Pattern(causal, None if side is None else (side, None if causal else side))
    pattern = pattern_of(mask)
    return pattern if mask.shape[0] == b and mask.shape[-2:] == (s, t) else None


def _apart(pattern: Pattern) -> bool:
    """Whether cu_seq_lens say all that the pattern's documents do."""
    return pattern.documents is None or pattern.packed


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | Tensor | None,
    max_length_k: int | Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    b, _, s, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_q = cu_seq_lens_q.to(torch.int32)
    cu_k = None if cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q else cu_seq_lens_k.to(torch.int32)
    longest_q = q.shape[0] if max_length_q is None else int(max_length_q)
    longest_k = k.shape[0] if max_length_k is None else int(max_length_k)
    causal: Causal = "bottom-right" if pattern.causal else False
    out = ops.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, causal=causal,
                               window=pattern.window, **options)  # fmt: skip
    return out.unflatten(0, (b, s))


# --- warnings --------------------------------------------------------------------------------------------------------

_warned: set[tuple[int, str]] = set()
_looked_at: list[weakref.ref[Tensor]] = []


def _warn(module: nn.Module, text: str) -> None:
    """Once for each text and model, which its layers share a config with."""
    owner = getattr(module, "config", module)
    key = (id(owner), text)
    if key not in _warned and not torch.compiler.is_compiling():
        _warned.add(key)
        weakref.finalize(owner, _warned.discard, key)
        warn(text, UserWarning, stacklevel=3)


def _look_for_leaks(module: nn.Module, pattern: Pattern, position_ids: Tensor | None) -> None:
    """Warns where positions start again within a row, but nothing keeps the documents apart.

    transformers looks at position_ids for packing only where there is neither a cache nor a 2-D mask, and
    config.use_cache makes a cache in training too: stock implementations then attend across documents in silence.
    """
    if position_ids is None or position_ids.dim() != 2 or pattern.packed or not pattern.causal:
        return
    if type(position_ids) is not Tensor or torch.compiler.is_compiling():  # no numbers to look at
        return
    if position_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if _looked_at and _looked_at[0]() is position_ids:
        return
    _looked_at[:] = [weakref.ref(position_ids)]  # the other layers get the same tensor
    again = position_ids.diff() < 1
    if pattern.documents is not None:  # padding: its positions mean nothing
        real = pattern.documents[1] == 0
        if real.shape[1] != position_ids.shape[1]:
            return
        again = again & real[:, 1:] & real[:, :-1]
    if again.any():
        _warn(
            module,
            "position_ids start again within a row, but transformers ignores that where there is a cache or an "
            "attention_mask, which some models make themselves: the documents attend to each other. Pass "
            "use_cache=False and no attention_mask, or cu_seq_lens_q/k and max_length_q/k, as "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them",
        )


# --- a model on it ---------------------------------------------------------------------------------------------------


def apply(model: nn.Module, report: Report) -> None:
    """Every attention that goes through the interface on "fastlm", and the projections of those."""
    assert isinstance(model, PreTrainedModel)
    layers = {name: module for name, module in model.named_modules() if _uses_interface(module)}
    reason = _reason(model, layers)
    if reason is not None:
        report.leave("", type(model).__name__, "attention", reason)
        return
    model.__dict__[_BEFORE] = _Before([(config, config._attn_implementation) for config in _configs(model)])
    model.set_attn_implementation(NAME)
    for name, module in layers.items():
        kind, config = type(module).__name__, module.config
        if config._attn_implementation == NAME:
            report.replace(name, kind, "attention", "ops.attention", f"was {model.__dict__[_BEFORE].of(config)}")
        else:
            report.leave(name, kind, "attention", "transformers cannot change its implementation")
    for name in sorted({_outermost(model, name) for name in layers}):
        swap_linears(name, model.get_submodule(name), "attention", report)


def undo(model: nn.Module) -> None:
    """Every config as apply() found it."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        for config, implementation in before.entries:
            config._attn_implementation_internal = implementation


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Those of the model's modules, and the configs within them, each once."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


class _Before:
    """What each config had. A class of this module, so that a pickled model brings the registration with it."""

    def __init__(self, entries: list[tuple[Any, str | None]]) -> None:
        self.entries = entries

    def of(self, config: Any) -> str | None:
        return next(implementation for known, implementation in self.entries if known is config)


def _reason(model: PreTrainedModel, layers: dict[str, nn.Module]) -> str | None:
    """Why the model's attention is left, or None."""
    if not layers:
        return "its attention does not go through transformers' AttentionInterface"
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not (part._supports_sdpa or part._supports_flash_attn):
            return f"{type(part).__name__} supports neither sdpa nor flash attention: its own may be of another kind"
    for module in layers.values():
        size = getattr(module, "head_dim", 0)
        if isinstance(size, int) and size > _LARGEST_HEAD:
            return f"its heads are of {size}, above the limit {_LARGEST_HEAD} of the kernels"
    return None


def _uses_interface(module: nn.Module) -> bool:
    own = hasattr(module, "config") and not isinstance(module, PreTrainedModel)
    kind: type = type(module)
    return own and _class_uses_interface(kind)


@cache
def _class_uses_interface(kind: type) -> bool:
    forwards = [vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base) and base is not nn.Module]
    return any("ALL_ATTENTION_FUNCTIONS" in _names(forward) for forward in forwards)


def _names(function: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def _outermost(model: nn.Module, name: str) -> str:
    """The attention a layer is part of: BertSelfAttention's projection behind it belongs to BertAttention."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        module = model.get_submodule(outer)
        if "Attention" in type(module).__name__ and not isinstance(module, PreTrainedModel):
            return outer
    return name


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _masks.mask)
