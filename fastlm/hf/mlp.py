"""The feed-forward parts of a transformers model: gated ones, and GELU where it stands alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm import ops
from fastlm.hf._linear import swap_linears
from fastlm.hf._probe import close, draw, foreign, stand_in
from fastlm.patching import STATE, Report, obstacle, swap

_GATED, _GELU = f"{STATE}gated", f"{STATE}gelu"
_FUSED: dict[str, tuple[str, Callable[[Tensor, Tensor | None], Tensor]]] = {
    "silu": ("ops.swiglu", lambda gate, up: ops.swiglu(gate, up)),
    "gelu": ("ops.geglu", lambda gate, up: ops.geglu(gate, up)),
    "gelu_tanh": ("ops.geglu with tanh", lambda gate, up: ops.geglu(gate, up, approximate="tanh")),
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


@dataclass(frozen=True)
class Gated:
    """What a gated feed-forward part computes: down(dropout(activation(gate(x)) * up(x))).

    Attributes:
        gate, up, down: the projections' names; up is None where gate gives both, [gate | up].
        activation: "silu", "gelu" or "gelu_tanh".
        act: the name of the module that computes it, and its class; None where the forward calls a function.
        dropout: the name of the module between the product and down, or None.
        cast: whether the product is cast to the dtype of down's weight, which T5 keeps in float32.
    """

    gate: str
    up: str | None
    down: str
    activation: str
    act: tuple[str, type] | None
    dropout: str | None
    cast: bool


class GatedMLP(nn.Module):
    """The forward of a gated part: its own projections, called as modules, and one op for what is between them."""

    _fastlm_gated: Gated

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._fastlm_gated
        if len(args) != 1 or kwargs or not _untouched(self._modules, spec):
            return super().forward(*args, **kwargs)
        gate = getattr(self, spec.gate)(args[0])
        up = None if spec.up is None else getattr(self, spec.up)(args[0])
        hidden = _FUSED[spec.activation][1](gate, up)
        if spec.dropout is not None:
            hidden = getattr(self, spec.dropout)(hidden)
        down: Any = getattr(self, spec.down)
        if spec.cast and isinstance(getattr(down, "weight", None), Tensor) and down.weight.is_floating_point():
            hidden = hidden.to(down.weight.dtype)
        return down(hidden)


class Gelu(nn.Module):
    """The forward of an activation module that is GELU.

    Exact GELU in float32 on a CPU is torch's where no gradient is asked for: its forward alone is the faster one there
    (1.25 times on two cores with AVX-512), forward and backward together are ours.
    """

    _fastlm_gelu: str

    def forward(self, input: Tensor) -> Tensor:
        exact = self._fastlm_gelu == "none"
        if exact and input.is_cpu and input.dtype is torch.float32 and not torch.is_grad_enabled():
            return F.gelu(input)
        return ops.gelu(input, approximate=self._fastlm_gelu)


def apply(model: nn.Module, report: Report) -> None:
    """Replaces gated parts, GELU and the projections around them, and reports the others."""
    known: dict[Any, Gated | str] = {}
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        names = next((n for n in _PROJECTIONS if {c for c in n if c is not None} <= set(module._modules)), None)
        if names is None or module in fused:
            continue
        kind, act = type(module).__name__, _act(module)
        reason = obstacle(module) or foreign(module)
        if reason is None and act is not None:
            inside = module.get_submodule(act[0])
            reason = obstacle(inside) or foreign(inside)
        if reason is not None:
            report.leave(name, kind, "mlp", reason)
            continue
        key = (type(module), names, act)
        if key not in known:
            known[key] = gated(module, names)
        found = known[key]
        if isinstance(found, str):
            report.leave(name, kind, "mlp", found)
            continue
        swap(module, GatedMLP)
        setattr(module, _GATED, found)
        report.replace(name, kind, "mlp", _FUSED[found.activation][0])
        if found.act is not None:
            fused.add(module.get_submodule(found.act[0]))
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


def _act(module: nn.Module) -> tuple[str, type] | None:
    return next(((name, type(module._modules[name])) for name in _ACTIVATIONS if name in module._modules), None)


def _untouched(children: dict[str, nn.Module | None], spec: Gated) -> bool:
    """Whether the activation, which is not called by itself, is the one that was found, with nobody listening to it."""
    if spec.act is None:
        return True
    act: Any = children.get(spec.act[0])
    same = type(act) is spec.act[1] and "forward" not in act.__dict__
    if not same:
        return False
    return not (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)


class _Mark(nn.Module):
    """In dropout's place: shows where it acts."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + x * x


def gated(module: nn.Module, names: tuple[str, str | None, str]) -> Gated | str:
    """What a gated part computes, found by its own forward with small projections; or why it is none."""
    act = _act(module)
    dropout = next((name for name in _DROPOUTS if name in module._modules), None)
    allowed = {*names, dropout, None if act is None else act[0]}
    more = set(module._modules) - allowed
    if more or module._parameters or module._buffers:
        return f"its forward may use {', '.join(sorted({*more, *module._parameters, *module._buffers}))} too"
    width = 24
    gate, up, down = names
    for activation in _FUSED:
        spec = Gated(gate, up, down, activation, act, dropout, False)
        if _follows(spec, module, width, torch.float32):
            # Only a forward that casts can hand float32 on to a projection in float64.
            return Gated(gate, up, down, activation, act, dropout, _follows(spec, module, width, torch.float64))
    return "it is not down(act(gate(x)) * up(x)) with silu or gelu"


def _follows(spec: Gated, module: nn.Module, width: int, last: torch.dtype) -> bool:
    """Whether the module's forward gives the spec's results with small projections of random numbers."""
    hidden = 2 * width
    children: dict[str, nn.Module] = {
        spec.gate: _linear(width, hidden if spec.up is not None else 2 * hidden, 1, torch.float32),
        spec.down: _linear(hidden, width, 2, last),
    }
    if spec.up is not None:
        children[spec.up] = _linear(width, hidden, 3, torch.float32)
    if spec.dropout is not None:
        children[spec.dropout] = _Mark()
    x = draw(7, width, seed=4)
    with torch.no_grad():
        first = children[spec.gate](x)
        a, b = (first, children[spec.up](x)) if spec.up is not None else first.chunk(2, -1)
        h = (F.silu(a) if spec.activation == "silu" else F.gelu(a, approximate=spec.activation[5:] or "none")) * b
        h = h if spec.dropout is None else children[spec.dropout](h)
        expected = children[spec.down](h.to(last))
        if spec.act is not None:
            children[spec.act[0]] = module.get_submodule(spec.act[0])
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
