"""Finding out what a module of transformers computes: by running its own forward on small numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def foreign(module: nn.Module) -> str | None:
    """None where the module runs code of torch or transformers alone, which is the same whenever it is called."""
    kind = type(module)
    for what, where in ((f"its class {kind.__name__}", kind.__module__), ("its forward", kind.forward.__module__)):
        if not where.startswith(("transformers.", "torch.nn.")):
            return f"{what} is {where}'s own, neither torch's nor transformers'"
    return None


def stand_in(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter | None] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A module of that class with the same attributes and buffers, but no hooks, and these parameters and children in
    place of its own."""
    kind: Any = type(module)
    double = kind.__new__(kind)
    nn.Module.__init__(double)
    kept = cast(nn.Module, double).__dict__
    kept.update({name: value for name, value in module.__dict__.items() if name not in kept})
    kept["_buffers"] = dict(module._buffers)
    kept["_parameters"] = dict(module._parameters if parameters is None else parameters)
    kept["_modules"] = dict(module._modules if modules is None else modules)
    kept["training"] = False
    return cast(nn.Module, double)


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normally distributed float32 numbers on the CPU; torch's own generators are left alone."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def close(found: object, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether it is a tensor like expected, to that share of expected's largest entry."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return bool(difference <= tolerance * expected.detach().double().abs().max())
