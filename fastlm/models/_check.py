"""What every model checks of its config and of the tensors it is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

Config = TypeVar("Config")


def check_sizes(config: Any, *names: str, optional: Iterable[str] = ()) -> None:
    """Each of these fields is an integer of at least 1, or None where it is optional."""
    for name in (*names, *optional):
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1{' or None' * (name in optional)}, got {value!r}")


def check_heads(config: Any) -> None:
    """Heads divide the width."""
    if config.width % config.heads:
        raise ValueError(f"width must be a multiple of heads, got width={config.width}, heads={config.heads}")


def check_choice(config: Any, name: str, *allowed: str) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def check_probability(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def config_from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """The config of asdict() or of a config.json. Raises ValueError on unknown or missing names."""
    known = fields(cls)  # type: ignore[arg-type]
    names = [f.name for f in known]
    unknown = sorted(set(values) - set(names))
    missing = [f.name for f in known if f.default is MISSING and f.name not in values]
    if unknown or missing:
        raise ValueError(f"config has unknown names {unknown} and lacks {missing}; its names are {names}")
    return cls(**values)


def check_tokens(tokens: Tensor, context: int, vocab_size: int, name: str = "tokens") -> None:
    """(B, S) int64 ids below vocab_size, S at most the context.

    Raises:
        TypeError: another dtype. ValueError: another shape, or an id outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
        raise TypeError(f"{name} must be a Tensor of int64, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2 or tokens.shape[1] > context:
        raise ValueError(f"{name} must be (B, S) with S at most {context}, got {tuple(tokens.shape)}")
    # On an accelerator this would wait for the device; there the embedding checks on its own.
    if tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie in 0 .. {vocab_size - 1}, got {low} .. {high}")


def check_targets(targets: Tensor, shape: torch.Size, like: str = "tokens") -> None:
    """int64 targets of this shape."""
    if not isinstance(targets, Tensor) or targets.shape != shape or targets.dtype is not torch.int64:
        got = f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be {tuple(shape)} of int64 like {like}, got {got}")


def check_mask(mask: Tensor | None, tokens: Tensor, name: str = "mask") -> None:
    """bool, shaped as the tokens."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{name} must be a Tensor of bool (True: a token, False: padding) or None, got {got}")
    if mask.shape != tokens.shape:
        raise ValueError(f"{name} must be {tuple(tokens.shape)} like the tokens, got {tuple(mask.shape)}")
