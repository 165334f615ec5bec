"""The head and its loss in one op, which never holds all logits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastlm import nn as fnn
from fastlm.hf import attention
from fastlm.hf._logits import DeferredLogits
from fastlm.patching import Report, obstacle, restore, swap

_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class _Head:
    """A head whose logits in a training step are made when somebody reads them, which a cross-entropy does not."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not _fits(self, input):
            return cast(Tensor, super().forward(input))  # type: ignore[misc]
        linear = fnn.functional.linear if isinstance(self, fnn.Linear) else nn.functional.linear
        return DeferredLogits.of(linear, input, self.weight, self.bias)


class _Rehearsal(_Head):
    def forward(self: Any, input: Tensor) -> Tensor:
        self._fastlm_logits = super().forward(input)
        return cast(Tensor, self._fastlm_logits)


def _fits(head: Any, input: Any) -> bool:
    """Whether this call may be put off: nobody watches it, and its weight is what it is until the loss."""
    if not (head.training and torch.is_grad_enabled() and type(input) in _PLAIN and input.is_floating_point()):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in head.__dict__:
        return False
    weight, bias = head.weight, head.bias
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or hasattr(tensor, "ds_id") or tensor.device != input.device:
            return False
        if tensor.dtype is not input.dtype and not torch.is_autocast_enabled(input.device.type):
            return False
    if weight.dim() != 2 or input.shape[-1] != weight.shape[1] or not weight.is_floating_point():
        return False
    return bool(input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def apply(model: Any, report: Report) -> None:
    """Patches the model's head. The report says what the model does to logits before the loss; see _rehearse()."""
    head = model.get_output_embeddings()
    if head is None:
        return
    name = next((name for name, module in model.named_modules() if module is head), None)
    kind, reason, remark = type(head).__name__, obstacle(head), ""
    if reason is None and type(head) not in (nn.Linear, fnn.Linear):
        reason = f"its class is {type(head).__module__}.{kind}, not torch.nn.Linear"
    if reason is None:
        reason, remark = _rehearse(model)
    if name is None or reason is not None:
        report.leave(name or "", kind, "loss", reason or "it is no module of the model")
        return
    swap(head, _Head)
    report.replace(name, kind, "loss", "ops.linear_cross_entropy", remark)


def _rehearse(model: Any) -> tuple[str | None, str]:
    """Why the head is to be left, or None; and what there is to know about its loss.

    A training step of a copy of the model without elements (fake tensors), which touches neither the model nor any
    generator of random numbers, shows whether the logits go straight from the head to a cross-entropy. Where it
    cannot be run, the head is patched all the same: logits that a model uses for something else are made, as ever.
    """
    if "_loss_function" in model.__dict__:
        return None, "the model's loss_function was set: fused where it calls cross_entropy on the logits"
    try:
        with torch.random.fork_rng(devices=[]), _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            copy = _copy(model, mode)
            copy(**_batch(model))
            logits = copy.get_output_embeddings()._fastlm_logits
    except Exception:  # any code may run here; what it does not like about the copy says nothing about the model
        return None, ""
    if logits.fused is None:
        return f"the model calls {logits.maker or 'no cross_entropy'} on its logits before the loss", ""
    factor, softcap = logits.fused
    changes = ("" if factor == 1.0 else f"scaled by {factor:g}", "" if softcap is None else f"softcap {softcap:g}")
    return None, ", ".join(change for change in changes if change)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and no log of what fake tensors cannot do: it would read as an error of the model's."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _copy(model: Any, mode: FakeTensorMode) -> Any:
    """The model as stock, in train mode, of fake tensors and without its hooks."""
    if any("forward" in module.__dict__ for module in model.modules()):
        raise ValueError("a forward bound to the model would run the model itself")
    memo = {id(t): mode.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, memo)
    attention.undo(copy)
    for module in copy.modules():
        restore(module)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    swap(copy.get_output_embeddings(), _Rehearsal)
    return copy.train().requires_grad_()


def _batch(model: Any) -> dict[str, Tensor]:
    tokens = torch.zeros((1, 4), dtype=torch.int64, device=model.device)
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, "labels": tokens}
    features = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return {"input_features": torch.zeros(features, dtype=model.dtype, device=model.device), "labels": tokens}
