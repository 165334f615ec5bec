"""A layer of fastlm.nn beside torch's with the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import nn


def pair(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, with weights large enough that no part of the layer is lost in another's noise."""
    ours, theirs = getattr(nn, name)(*arguments, **options), getattr(torch.nn, name)(*arguments, **options)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(
    module: Any, inputs: Sequence[Tensor], roles: Sequence[int] | None = None, dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:  # fmt: skip
    """The output, and the gradients of inputs, of float masks that want one, and of parameters.

    roles say which input is which argument, so that two of them can be one tensor.
    """
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    masks = [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on masks of two dtypes
        out = module(*(leaves[i] for i in roles or range(len(leaves))), **options)
    out = out[0] if isinstance(out, tuple) else out
    wanted = [*leaves, *masks, *(p for p in module.parameters() if p.requires_grad)]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry."""
    assert ours.shape == theirs.shape and ours.dtype is theirs.dtype
    worst = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    assert worst <= tolerance * largest, f"{worst:.2e} beside a largest of {largest:.2e}"


def agree(modules: Sequence[Any], inputs: Sequence[Tensor], roles: Sequence[int] | None = None, **options: Any) -> None:
    """Outputs and all gradients, float32."""
    for a, b in zip(*(results(module, inputs, roles, **options) for module in modules), strict=True):
        close(a, b)
