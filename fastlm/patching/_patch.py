"""patch() and unpatch(): fastlm's forward in the torch layers of any model."""

from __future__ import annotations

from torch import nn

import fastlm.nn
from fastlm.patching._feed_forward import PLAN, FeedForward, recognise
from fastlm.patching._kinds import KINDS, Kind, kind_of, looks_like, overridden
from fastlm.patching._obstacles import obstacle
from fastlm.patching._report import Report
from fastlm.patching._rms_norm import FORMULA, RecognisedRMSNorm, recognise_rms_norm
from fastlm.patching._swap import ENABLED, restore, swap, swapped


def patch(
    model: nn.Module, *, attention: bool = True, norm: bool = True, mlp: bool = True, loss: bool = True
) -> Report:
    """Makes the layers of a PyTorch model run on fastlm's kernels; it stays the same model, object by object.

    Parameters, their names, the state dict, hooks, device, dtype, mode and what an optimizer holds stay as they are; a
    copy of the model, or what pickle and torch.save make of it, is patched too. A part that cannot be fused at a call
    (hooks inside, attention weights asked for, tensors of another kind) runs as before in that call. What the model
    calls by itself in a forward of its own, such as torch.nn.functional.cross_entropy, is not seen.

    Args:
        model: any torch.nn.Module; compiled by torch.compile, or wrapped in DistributedDataParallel, too.
        attention: torch.nn.MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer and their stacks.
        norm: torch.nn.LayerNorm, RMSNorm; modules of any class that compute RMSNorm.
        mlp: torch.nn.GELU; modules of any class that compute down(act(gate(x)) * up(x)), with gate and up in one
            product or two, or fc2(gelu(fc1(x))) with a gelu of torch.nn.functional; act is SiLU or GELU.
        loss: torch.nn.CrossEntropyLoss, LinearCrossEntropyLoss.

    Returns:
        What was replaced, what was left, and why; it is printed too.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: there is nothing in it to replace, or nothing more.
        The model is then as it was.
    """
    _check(model)
    wanted = {"attention": attention, "norm": norm, "mlp": mlp, "loss": loss}
    report = Report(type(model).__name__)
    done: list[nn.Module] = []
    covered: set[int] = set()
    try:
        for name, module in list(model.named_modules()):
            if id(module) not in covered:
                _visit(name, module, wanted, report, done, covered)
        if not report.replaced:
            raise ValueError(_nothing(wanted, report))
    except BaseException:
        for module in done:
            restore(module)
        raise
    print(report)
    return report


def unpatch(model: nn.Module) -> None:
    """Puts back everything patch() replaced.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: nothing in it is patched, or what is has since been given a forward by someone else, who would go
            on calling the patched one.
    """
    _check(model)
    patched = {name: module for name, module in model.named_modules() if swapped(module) is not None}
    if not patched:
        raise ValueError("model is not patched: there is nothing to undo")
    for name, module in patched.items():
        if "forward" in module.__dict__:
            raise ValueError(f"{name or 'model'} was given a forward by someone else after patch(): undo that first")
    for module in patched.values():
        restore(module)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(ENABLED in module.__dict__ for module in model.modules()):
        raise ValueError("model is enabled by fastlm.hf.enable: call fastlm.hf.disable first")


def _visit(
    name: str,
    module: nn.Module,
    wanted: dict[str, bool],
    report: Report,
    done: list[nn.Module],
    covered: set[int],
) -> None:
    """Replaces or leaves one module; those that it stands for itself are added to covered."""
    kind = kind_of(module)
    if kind is None:
        like = looks_like(module)
        if like is not None and wanted[like[1]]:
            report.leave(name, like[0], like[1], obstacle(module) or f"it is quantised ({type(module).__module__})")
        elif like is None:
            _own_class(name, module, wanted, report, done, covered)
        return
    if not wanted[kind.part]:
        return
    reason = _reason(module, kind)
    if reason is not None:
        report.leave(name, type(module).__name__, kind.part, reason)
        return
    done.append(module)
    swap(module, kind.layer)
    report.replace(name, type(module).__name__, kind.part, f"nn.{kind.layer.__name__}", kind.remark)
    parts = (module._modules.get(child) for child in kind.stands_for)
    covered |= {id(child) for child in parts if type(child) in (nn.LayerNorm, nn.GELU)}


def _reason(module: nn.Module, kind: Kind) -> str | None:
    if swapped(module) is not None:
        return "it is replaced already"
    if isinstance(module, getattr(fastlm.nn, kind.original.__name__)):
        return "it is fastlm's own"
    reason = obstacle(module)
    if reason is not None:
        return reason
    changed = overridden(type(module), kind.original)
    return f"its class has its own {', '.join(changed)}" if changed else None


def _own_class(
    name: str, module: nn.Module, wanted: dict[str, bool], report: Report, done: list[nn.Module], covered: set[int]
) -> None:
    """A module of a user's class: replaced where its forward is recognised."""
    kind, layer = type(module).__name__, swapped(module)
    if layer is not None:
        part = _PART_OF.get(layer)
        if part is not None and wanted[part]:
            report.leave(name, kind, part, "it is replaced already")
        return
    plan = recognise(module) if wanted["mlp"] else None
    formula = recognise_rms_norm(module) if plan is None and wanted["norm"] else None
    if plan is None and formula is None:
        return
    part = "norm" if plan is None else "mlp"
    reason = obstacle(module)
    if reason is not None:
        report.leave(name, kind, part, reason)
        return
    done.append(module)
    if plan is None:
        swap(module, RecognisedRMSNorm)
        setattr(module, FORMULA, formula)
        report.replace(name, kind, part, "ops.rms_norm")
        return
    swap(module, FeedForward)
    setattr(module, PLAN, plan)
    covered |= {id(module.get_submodule(child.name)) for child in plan.silent}
    report.replace(name, kind, part, plan.op)


_PART_OF: dict[type, str] = {FeedForward: "mlp", RecognisedRMSNorm: "norm"}


def _nothing(wanted: dict[str, bool], report: Report) -> str:
    if any(entry.reason == "it is replaced already" for entry in report.left):
        return f"model is patched already: there is nothing more to replace. {report}"
    names = [f"torch.nn.{kind.original.__name__}" for kind in KINDS.values() if wanted[kind.part]]
    if wanted["norm"]:
        names.append("RMSNorms of any class")
    if wanted["mlp"]:
        names.append("feed-forward modules with a SiLU or GELU")
    if not names:
        return "model has nothing to replace: attention, norm, mlp and loss are all False"
    return f"model has nothing to replace, of {', '.join(names)}. {report}"
