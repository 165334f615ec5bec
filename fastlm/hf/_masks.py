"""The mask function of attn_implementation="fastlm", and what the attention function learns from its masks.

transformers describes a mask as a function of (batch, head, query, key), put together from parts of masking_utils.
sdpa evaluates it to a (B, 1, S, T) bool, which a kernel must then read for every head. Told "causal", "window" or
"documents" instead, ours skips whole tiles and is 2 to 6 times as fast in bfloat16. So the function is taken apart as
well, and where all of its parts are known, what they say is noted beside the mask as a Pattern. The mask itself stays
true: a model that cuts it, adds to it or hands it elsewhere gets a tensor without the note, or one that has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from fastlm.ops.attention import Causal, Window

_NOTE = "_fastlm_pattern"


class Pattern(NamedTuple):
    """A mask as options of ops.attention."""

    causal: Causal = False
    window: Window | None = None
    documents: tuple[Tensor, Tensor] | None = None
    """(B, S) and (B, T). A padded key is in document 1, and every query in 0."""
    packed: bool = False
    """Whether the documents are those of packing, not padding."""


def mask(**arguments: Any) -> Tensor | None:
    """What AttentionMaskInterface calls: takes what sdpa_mask takes and returns None, or bool, True where attended."""
    if torch.compiler.is_compiling():  # no notes in a graph, and sdpa_mask never leaves a mask out of one
        return None if _plain(**arguments) else sdpa_mask(**arguments)
    made = sdpa_mask(**arguments)
    pattern = None if made is None else _read(**arguments)
    if made is not None and pattern is not None:
        setattr(made, _NOTE, (pattern, _version(made)))
    return made


def _plain(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> bool:
    """Whether nothing but the shapes makes the mask, and it is the one a call without a mask has."""
    causal = allow_is_causal_skip and mask_function is masking_utils.causal_mask_function
    return causal and attention_mask is None and not isinstance(q_offset, Tensor) and q_length == kv_length


def pattern_of(mask: Tensor) -> Pattern | None:
    """What was noted of this mask, if it still holds."""
    if torch.compiler.is_compiling():
        return None
    pattern, version = getattr(mask, _NOTE, (None, None))
    return pattern if version == _version(mask) else None


def _version(mask: Tensor) -> int:
    return -1 if mask.is_inference() else mask._version


class _Parts:
    """What is found while a mask function is taken apart; `known` is False once a part is not understood."""

    def __init__(self) -> None:
        self.known, self.causal = True, False
        self.left: int | None = None
        self.right: int | None = None
        self.packed: Tensor | None = None

    def add(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__qualname__", "").partition(".")[0]
        if getattr(function, "__module__", "") != masking_utils.__name__:
            name = ""
        cells = getattr(function, "__closure__", None) or ()
        held = dict(zip(function.__code__.co_freevars, cells, strict=True)) if cells else {}
        values = {key: cell.cell_contents for key, cell in held.items()}
        if name == "causal_mask_function":
            self.causal = True
        elif name == "and_masks":
            for part in values["mask_functions"]:
                self.add(part)
        elif name == "sliding_window_overlay":
            self._window(values["sliding_window"] - 1, None)
        elif name == "sliding_window_bidirectional_overlay":
            self._window(values["sliding_window"], values["sliding_window"])
        elif name == "packed_sequence_mask_function" and self.packed is None:
            self.packed = values["packed_sequence_mask"]
        elif name == "remap_positions_for_packed_sequence":
            # Positions rise by one within a document, so that their differences are those of the indices.
            self.add(values["mask_function"])
        elif name != "bidirectional_mask_function":
            self.known = False

    def _window(self, left: int, right: int | None) -> None:
        self.known &= self.left is None and isinstance(left, int)
        self.left, self.right = left, right


def _read(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Pattern | None:
    parts = _Parts()
    parts.add(mask_function)
    if not parts.known or isinstance(q_offset, Tensor):
        return None
    offset = q_offset - kv_offset  # query i stands at key i + offset
    causal: Causal = parts.causal
    if offset != 0:
        if not parts.causal or offset != kv_length - q_length:
            return None
        causal = "bottom-right"
    window = None if parts.left is None else (parts.left, parts.right)
    if parts.packed is not None:
        if attention_mask is not None or offset != 0 or q_length != kv_length:
            return None
        ids = parts.packed.expand(batch_size, -1)
        return Pattern(causal, window, (ids, ids), packed=True)
    if attention_mask is None:
        return Pattern(causal, window)
    real = attention_mask[:, kv_offset : kv_offset + kv_length]
    keys = torch.ones((batch_size, kv_length), dtype=torch.int32, device=device)
    keys[:, : real.shape[1]] = ~real
    return Pattern(causal, window, (keys.new_zeros((batch_size, q_length)), keys))
