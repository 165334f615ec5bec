"""ops.transformer_block on the parameters of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlm.nn._autocast import autocast_dtype, lower
from fastlm.ops.transformer_block import LINEAR, takes, transformer_block


def fit(x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Whether the op takes x and these twelve as they are: nothing frozen in part, of another dtype than x, or made by
    a parametrization; both norms have a weight."""
    first = parameters[0]
    if first is None or parameters[6] is None or not takes(x) or not x.numel():
        return False
    if autocast_dtype(x.device) not in (None, torch.bfloat16):
        return False
    dtype, trained = x.dtype, first.requires_grad
    return all(
        p is None or (type(p) is Parameter and p.dtype is dtype and p.requires_grad is trained) for p in parameters
    )


def run(
    x: Tensor, parameters: Sequence[Tensor | None], rope: tuple[Tensor, Tensor] | None = None, **options: Any
) -> Tensor:
    """ops.transformer_block of what fit() takes, under autocast with products in its dtype."""
    dtype, lowered = autocast_dtype(x.device), None
    if dtype is not None and dtype is not x.dtype:
        with torch.no_grad():  # the op makes the gradients of the parameters themselves
            lowered = [lower(parameters[i], dtype) for i in LINEAR]
    return transformer_block(x, parameters, rope, lowered=lowered, **options)
