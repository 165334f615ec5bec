"""Hugging Face models on fastlm's kernels: enable() and disable() on a model that is there already."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from fastlm.patching import ENABLED, Report, restore, swapped

PARTS = ("norm", "mlp", "rope", "attention", "loss")
TESTED = ((5, 21), (5, 24))
"""The versions of transformers whose internals this knows: the first, and the first that is too new."""


def enable(
    model: nn.Module,
    attention: bool = True,
    norm: bool = True,
    mlp: bool = True,
    rope: bool = True,
    loss: bool = True,
) -> Report:
    """Makes a transformers model run on fastlm's kernels; it stays the same model, object by object.

    Args:
        model: a transformers.PreTrainedModel, or a peft model around one. Parameters, names, state dict, hooks, config
            and mode stay as they are.
        attention: attention with attn_implementation="fastlm", projections included.
        norm: LayerNorm and RMSNorm, with the offsets and casts of each family.
        mlp: gated and plain feed-forward parts.
        rope: rotary position embedding.
        loss: the head and its loss in one op, which never holds all logits: outputs.logits of a training step is a
            tensor that is made when it is first read, before the next step of the optimizer.

    Returns:
        What was replaced, what was left, and why; it is printed too.

    Raises:
        ImportError: transformers is not installed, or a version this was not tested with.
        TypeError: model is no transformers model, or one inside a wrapper.
        ValueError: the model is enabled or patched already, sharded by FSDP or without weights (on the meta device), or
            there is nothing in it to replace.
        The model is then as it was.
    """
    wanted = {"attention": attention, "norm": norm, "mlp": mlp, "rope": rope, "loss": loss}
    parts = [part for part in PARTS if wanted[part]]
    if not parts:
        raise ValueError("attention, norm, mlp, rope and loss are all False: there is nothing to enable")
    inner = _pretrained(model)
    if ENABLED in inner.__dict__:
        enabled = ", ".join(inner.__dict__[ENABLED])
        raise ValueError(f"model is enabled already, with {enabled}: call fastlm.hf.disable first")
    if any(swapped(module) is not None for module in inner.modules()):
        raise ValueError("model is patched by fastlm.patch: call fastlm.unpatch first")
    weights = list(inner.parameters())
    if weights and all(weight.is_meta for weight in weights):
        raise ValueError("model is on the meta device: load its weights first")
    report = Report(type(inner).__name__)
    modules = [_part(part) for part in parts]
    try:
        for module in modules:
            module.apply(inner, report)
        if not report.replaced:
            raise ValueError(f"model has nothing to replace. {report}")
    except BaseException:
        _undo(inner, parts)
        raise
    inner.__dict__[ENABLED] = parts
    print(report)
    return report


def disable(model: nn.Module) -> None:
    """Puts back everything enable() replaced.

    Raises:
        ValueError: the model is not enabled.
    """
    inner = _pretrained(model)
    parts = inner.__dict__.pop(ENABLED, None)
    if parts is None:
        raise ValueError("model is not enabled: there is nothing to undo")
    _undo(inner, parts)


def register() -> None:
    """Makes attn_implementation="fastlm" known to transformers, for from_pretrained() and set_attn_implementation().

    enable() does so itself. Only attention is then fastlm's, in every model that asks for it.

    Raises:
        ImportError: transformers is not installed, or a version this was not tested with.
    """
    _transformers()
    _part("attention")


def __getattr__(name: str) -> Any:
    if name in ("ThroughputCallback", "optimizer"):  # they import transformers
        return getattr(_part("trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _part(name: str) -> Any:
    return importlib.import_module(f"fastlm.hf.{name}")


def _undo(model: nn.Module, parts: Sequence[str]) -> None:
    for part in reversed(parts):
        undo = getattr(_part(part), "undo", None)
        if undo is not None:
            undo(model)
    for module in model.modules():
        restore(module)


def _pretrained(model: nn.Module) -> nn.Module:
    transformers = _transformers()
    inside = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(_is_sharded(module) for module in inside):
        raise ValueError(f"{type(model).__name__} is sharded by FSDP: fastlm.hf.enable and disable come before that")
    find: Any = getattr(model, "get_base_model", None)  # peft's
    inner = find() if inside and callable(find) else model
    if not isinstance(inner, transformers.PreTrainedModel):
        hint = (
            ", with one inside: pass that" if any(isinstance(m, transformers.PreTrainedModel) for m in inside) else ""
        )
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}{hint}")
    return inner


def _is_sharded(module: nn.Module) -> bool:
    """By FSDP, or fully_shard(), whose own class would be lost with the one that fastlm gave the module."""
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)


def _transformers() -> ModuleType:
    first, beyond = (".".join(map(str, version)) for version in TESTED)
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        message = f"fastlm.hf needs transformers: pip install 'transformers>={first},<{beyond}'"
        raise ModuleNotFoundError(message, name="transformers") from None
    version = transformers.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not TESTED[0] <= (int(found[1]), int(found[2])) < TESTED[1]:
        raise ImportError(
            f"fastlm.hf knows the internals of transformers from {first} up to, not including, {beyond}; "
            f"{version} is installed: pip install 'transformers>={first},<{beyond}'"
        )
    return transformers
