"""Which of torch.nn's layers run on fastlm's, and which of a user's subclasses may."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import fastlm.nn
from fastlm.patching import _layers


class Kind(NamedTuple):
    """A class of torch.nn and what runs in its place; stands_for are attributes whose forward that runs itself."""

    original: type[nn.Module]
    layer: type[nn.Module]
    part: str
    remark: str = ""
    stands_for: tuple[str, ...] = ()


_PART = {
    "norm": ("LayerNorm", "RMSNorm"),
    "attention": (
        "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
        "TransformerDecoder",
    ),
    "mlp": ("GELU",),
    "loss": ("CrossEntropyLoss", "LinearCrossEntropyLoss"),
}  # fmt: skip
_REMARK = {"MultiheadAttention": "calls with need_weights=True run torch's own forward"}
_STANDS_FOR = {
    "TransformerEncoderLayer": ("norm1", "norm2", "activation"),
    "TransformerDecoderLayer": ("norm1", "norm2", "norm3", "activation"),
}

KINDS: dict[type, Kind] = {
    getattr(nn, name): Kind(
        getattr(nn, name), getattr(_layers, name, getattr(fastlm.nn, name)), part, _REMARK.get(name, ""),
        _STANDS_FOR.get(name, ()),
    )
    for part, names in _PART.items()
    for name in names
    if hasattr(nn, name)  # LinearCrossEntropyLoss is of torch 2.13
}  # fmt: skip
"""Linear, Embedding and Dropout are not here: in bfloat16 ops.linear takes 1.0 to 2.6 times torch's time, but for
products as large as a head's; ops.embedding on the CPU is torch's; another generator would change what a seed draws."""


def kind_of(module: nn.Module) -> Kind | None:
    """The first entry of KINDS in the module's class and those it is derived from."""
    return next((KINDS[base] for base in type(module).__mro__ if base in KINDS), None)


def looks_like(module: nn.Module) -> tuple[str, str] | None:
    """(name, part) of a class of torch.nn that the module stands for without being an instance of it: a scripted or a
    quantised layer."""
    name = None
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
    elif type(module).__module__.startswith("torch.ao.nn.quant"):
        name = type(module).__name__
    return next(
        ((kind.original.__name__, kind.part) for kind in KINDS.values() if kind.original.__name__ == name), None
    )


def overridden(kind: type, base: type) -> list[str]:
    """What a class changes of the torch.nn class it is derived from, as far as a forward may depend on it."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    known = {name for name in dir(base) if not name.startswith("__")} - {"_get_name", "extra_repr", "reset_parameters"}
    known |= {"__call__", "__getattr__", "__getattribute__"}
    return sorted(known & {name for cls in between for name in vars(cls)})
