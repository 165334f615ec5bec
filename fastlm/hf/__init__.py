"""Hugging Face models on fastlm's kernels: enable() and disable() on a model that is there already."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlm.patching import ENABLED, Report, restore, swapped

PARTS = ("norm", "mlp", "rope", "attention", "loss")


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
        TypeError: model is no transformers model.
        ValueError: the model is enabled or patched already, or there is nothing in it to replace.
        The model is then as it was.
    """
    wanted = {"attention": attention, "norm": norm, "mlp": mlp, "rope": rope, "loss": loss}
    parts = [part for part in PARTS if wanted[part]]
    inner = _pretrained(model)
    if ENABLED in inner.__dict__:
        enabled = ", ".join(inner.__dict__[ENABLED])
        raise ValueError(f"model is enabled already, with {enabled}: call fastlm.hf.disable first")
    if any(swapped(module) is not None for module in inner.modules()):
        raise ValueError("model is patched by fastlm.patch: call fastlm.unpatch first")
    report = Report(type(inner).__name__)
    try:
        for part in parts:
            _part(part).apply(inner, report)
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
        ImportError: transformers is not installed.
    """
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
    from transformers import PreTrainedModel

    find: Any = getattr(model, "get_base_model", None)  # peft's
    inner = model if find is None else find()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    return inner
