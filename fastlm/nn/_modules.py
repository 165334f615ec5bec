"""Whether a module does what its class is known for, so that its parts may be fused with those of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.nn import Module

F = TypeVar("F", bound=Callable[..., Any])


def unheard(module: Module) -> bool:
    """Whether nobody would notice that the module is not called: it has no hook and no forward of its own."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def same_as(layer: type[Module]) -> Callable[[F], F]:
    """Says of a forward that it computes what layer's does: runs() takes the one for the other."""

    def mark(forward: F) -> F:
        forward._fastlm_same_as = layer.forward  # type: ignore[attr-defined]
        return forward

    return mark


def runs(module: Module, *layers: type[Module]) -> bool:
    """Whether to call the module is to run one of these layers' forward on its attributes, and nothing else. True of a
    subclass that leaves the forward alone, such as a parametrized layer's."""
    forward = type(module).forward
    forward = getattr(forward, "_fastlm_same_as", forward)
    return any(forward is layer.forward for layer in layers) and unheard(module)
