"""The graph of a module's forward, and what it rests on that may change later."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

from torch import fx, nn


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not weightless(m) or m.__module__.startswith("torch.nn")


def trace(module: nn.Module, training: bool) -> fx.Graph | None:
    """The forward of a module of a user's class in that mode, by torch.fx; None where it cannot be traced, or does more
    than to compute a result. Run on a copy that shares the children: what the forward sets on itself stays there."""
    if type(module).__module__.partition(".")[0] in ("torch", "fastlm"):
        return None
    if any(isinstance(value, list | dict | set) for name, value in module.__dict__.items() if not name.startswith("_")):
        return None  # which a forward might fill, unseen
    probe = copy(module)
    probe.training = training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(probe)
    except Exception:  # a forward that torch.fx cannot trace may raise anything
        return None
    if probe.__dict__ != {**module.__dict__, "training": training}:  # it counts, or keeps what it computed
        return None
    return graph


def weightless(module: nn.Module) -> bool:
    """An activation, dropout: nothing in it."""
    return not (module._modules or module._parameters or module._buffers)


def settings_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Its plain attributes, which a trace takes for constants."""
    return tuple(
        (name, value) for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str | None)
    )  # fmt: skip


def unchanged(module: nn.Module, settings: tuple[tuple[str, Any], ...]) -> bool:
    have = module.__dict__
    return all(name in have and have[name] == value for name, value in settings)
