"""The feed-forward parts of a transformers model: gated ones, and GELU where it stands alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm import ops
from fastlm.hf._linear import swap_linears
from fastlm.hf._probe import close, draw, foreign, stand_in
from fastlm.patching import STATE, Report, obstacle, swap
from fastlm.patching._feed_forward import PLAN, FeedForward, Plan, Silent
from fastlm.patching._layers import few, gelu_limit, takes

_GELU = f"{STATE}gelu"
_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Names of the projections: gate, up, down; up None where the first holds both, [gate | up].
_PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("gate_up_proj", None, "down_proj"),
    ("input_linear", None, "output_linear"),
    ("Wi", None, "Wo"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
_WHERE_ACTIVATIONS_ARE = ("transformers.activations", "torch.nn.modules.activation")
_DROPOUTS = ("dropout", "drop")


class CastingFeedForward(FeedForward):
    """The forward of T5's part, which casts the product to the dtype of the last projection, kept in float32: such a
    model runs its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        plan: Plan = getattr(module, PLAN)
        first, last = (getattr(module._modules[name], "weight", None) for name in (plan.first, plan.after[-1]))
        if first is None or last is None or first.dtype is not last.dtype:
            return super(FeedForward, self).forward(*args, **kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)


class Gelu(nn.Module):
    """The forward of an activation module that is GELU; torch's own function where that is the faster one."""

    _fastlm_gelu: str

    def forward(self, input: Tensor) -> Tensor:
        if not takes(input):
            result: Tensor = super().forward(input)
            return result
        torchs = few(input, gelu_limit(input, self._fastlm_gelu == "tanh"))
        return (F.gelu if torchs else ops.gelu)(input, approximate=self._fastlm_gelu)


def apply(model: nn.Module, report: Report) -> None:
    """Replaces gated parts, GELU and the projections around them, and reports the others."""
    known: dict[Any, tuple[Plan, type] | str] = {}
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        names = next((n for n in _PROJECTIONS if {c for c in n if c is not None} <= set(module._modules)), None)
        if names is None:
            continue
        kind, act = type(module).__name__, _child(module, _ACTIVATIONS)
        reason = obstacle(module) or foreign(module)
        if reason is None and act is not None:
            inside = module.get_submodule(act)
            reason = obstacle(inside) or foreign(inside)
        if reason is not None:
            report.leave(name, kind, "mlp", reason)
            continue
        key = (type(module), names, None if act is None else type(module.get_submodule(act)))
        if key not in known:
            known[key] = gated(module, names)
        found = known[key]
        if isinstance(found, str):
            report.leave(name, kind, "mlp", found)
            continue
        plan, layer = found
        swap(module, layer)
        setattr(module, PLAN, plan)
        report.replace(name, kind, "mlp", plan.op)
        fused.update(module.get_submodule(silent.name) for silent in plan.silent)
    for name, module in model.named_modules():
        if module not in fused and (isinstance(module, nn.GELU) or "gelu" in type(module).__name__.lower()):
            _replace_gelu(name, module, report)
    for name, module in list(model.named_modules()):
        for child in _projections(module):
            swap_linears(f"{name}.{child}".lstrip("."), module.get_submodule(child), "mlp", report)


def _projections(module: nn.Module) -> list[str]:
    """The names of its children that are, or hold, projections of a feed-forward part."""
    if any(type(child).__module__ in _WHERE_ACTIVATIONS_ARE for child in module.children()):
        return [name for name, child in module.named_children() if type(child).__name__ in ("Linear", "Conv1D")]
    return [name for name in ("intermediate", "output") if {"intermediate", "output"} <= set(module._modules)]


def _replace_gelu(name: str, module: nn.Module, report: Report) -> None:
    kind = type(module).__name__
    reason = obstacle(module) or foreign(module)
    approximate = None if reason is not None else _gelu(module)
    if approximate is None:
        report.leave(name, kind, "mlp", reason or "it computes neither GELU nor its tanh form")
        return
    swap(module, Gelu)
    setattr(module, _GELU, approximate)
    report.replace(name, kind, "mlp", "ops.gelu" if approximate == "none" else "ops.gelu with tanh")


def _gelu(module: nn.Module) -> str | None:
    """Which GELU the module computes: "none" or "tanh"; None for another function."""
    if any(module.children()) or module._parameters or module._buffers:
        return None
    x = torch.linspace(-9.0, 9.0, 361)
    with torch.no_grad():
        found = type(module).forward(stand_in(module), x)
    return next((a for a in ("none", "tanh") if close(found, F.gelu(x, approximate=a), 1e-6)), None)


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in module._modules), None)


class _Mark(nn.Module):
    """In dropout's place: shows where it acts."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + x * x


def gated(module: nn.Module, names: tuple[str, str | None, str]) -> tuple[Plan, type] | str:
    """What a gated part does, found by its own forward with small projections, and the layer for it; or why it is none.

    Tracing, which finds the plans of users' classes, does not follow activations written out in torch's functions, nor
    T5's forward, which asks for dtypes.
    """
    act, dropout = _child(module, _ACTIVATIONS), _child(module, _DROPOUTS)
    more = {*module._modules, *module._parameters, *module._buffers} - {*names, act, dropout}
    if more:
        return f"its forward may use {', '.join(sorted(more))} too"
    first, up, down = names
    silent = () if act is None else (Silent(act, type(module.get_submodule(act)), ()),)
    after = (down,) if dropout is None else (dropout, down)
    for activation in _ACTIVATION:
        plan = Plan("packed" if up is None else "gated", activation, first, up, after, silent)
        if _follows(plan, module, torch.float32):
            # Only a forward that casts can hand float32 on to a projection in float64.
            return plan, CastingFeedForward if _follows(plan, module, torch.float64) else FeedForward
    return "it is not down(act(gate(x)) * up(x)) with silu or gelu"


def _follows(plan: Plan, module: nn.Module, last: torch.dtype, width: int = 24) -> bool:
    """Whether the module's forward gives the plan's results with small projections of random numbers."""
    hidden = 2 * width
    children: dict[str, nn.Module] = {
        silent.name: stand_in(module.get_submodule(silent.name)) for silent in plan.silent
    }
    children[plan.first] = _linear(width, hidden if plan.up is not None else 2 * hidden, 1, torch.float32)
    if plan.up is not None:
        children[plan.up] = _linear(width, hidden, 2, torch.float32)
    *dropout, down = plan.after
    children.update({name: _Mark() for name in dropout})
    children[down] = _linear(hidden, width, 3, last)
    x = draw(7, width, seed=4)
    with torch.no_grad():
        y = children[plan.first](x)
        gate, up = y.chunk(2, -1) if plan.up is None else (y, children[plan.up](x))
        y = _ACTIVATION[plan.activation](gate) * up
        for name in dropout:
            y = children[name](y)
        expected = children[down](y.to(last))
        try:
            found = type(module).forward(stand_in(module, modules=children), x[None])
        except (RuntimeError, TypeError):
            return False
    return close(found, expected[None])


def _linear(fan_in: int, fan_out: int, seed: int, dtype: torch.dtype) -> nn.Linear:
    """A projection of random numbers, wide enough that gates lie in [-6, 6]; drawn past torch's generator."""
    linear = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(fan_out, fan_in, scale=2.0 * fan_in**-0.5, seed=seed))
        linear.bias.copy_(draw(fan_out, scale=0.5, seed=seed + 10))
    return linear.requires_grad_(False)
