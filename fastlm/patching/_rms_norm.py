"""RMSNorm modules of any class, recognised by what their forward does."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn._autocast import autocast_dtype
from fastlm.patching import _layers
from fastlm.patching._swap import STATE
from fastlm.patching._trace import settings_of, trace, unchanged

FORMULA = f"{STATE}formula"
_FUNCTIONS = frozenset({
    operator.mul, operator.add, operator.truediv, operator.pow, torch.mul, torch.add, torch.div, torch.pow,
    torch.square, torch.mean, torch.sqrt, torch.rsqrt, getattr,
})  # fmt: skip
_METHODS = frozenset({
    "float", "to", "type_as", "pow", "square", "mean", "rsqrt", "sqrt", "mul", "add", "div",
})  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Formula(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), in the dtype that x and weight have."""

    weight: str
    eps: float
    offset: float
    dtypes: tuple[torch.dtype, ...]
    settings: tuple[tuple[str, Any], ...]

    def takes(self, module: nn.Module, x: Any, weight: Any) -> bool:
        return (
            not _layers.torch_s(x, _layers.RMS_NORM) and isinstance(weight, Tensor) and weight.dtype is x.dtype
            and x.dtype in self.dtypes and x.device == weight.device and x.shape[-1:] == weight.shape
            and (x.dtype is torch.float32 or autocast_dtype(x.device) is None) and unchanged(module, self.settings)
        )  # fmt: skip


class RecognisedRMSNorm:
    """The forward of a recognised module: one op, rounded once, at the end."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = cast(nn.Module, self)
        formula: Formula = getattr(module, FORMULA)
        weight: Any = getattr(module, formula.weight)
        if kwargs or len(args) != 1 or not formula.takes(module, args[0], weight):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return ops.rms_norm(args[0], weight, formula.eps, offset=formula.offset)


def recognise_rms_norm(module: nn.Module) -> Formula | None:
    """The formula of a module of a user's class, or None where it is no RMSNorm.

    Its forward, traced by torch.fx, may hold products, sums, powers, means and casts alone. Such a function is
    analytic, so that it is the formula's when it agrees with it on random numbers, whatever way it is written.
    """
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None]
    if module._modules or module._buffers or len(parameters) != 1:
        return None
    name, weight = parameters[0]
    settings = settings_of(module)
    numbers = [value for _, value in settings if isinstance(value, float)]
    if weight.dim() != 1 or weight.shape[0] < 2 or len(numbers) != 1 or not 0.0 < numbers[0] < 1.0:
        return None
    graphs = [trace(module, training) for training in (True, False)]
    if any(graph is None or not all(map(_allowed, graph.nodes)) for graph in graphs):
        return None
    if str(graphs[0]) != str(graphs[1]):
        return None
    for offset in (0.0, 1.0):
        if _follows(module, name, weight.shape[0], numbers[0], offset):
            runs = [(dtype, _run(module, name, _draw(2, weight.shape[0]), dtype)) for dtype in _DTYPES]
            dtypes = tuple(dtype for dtype, y in runs if y is not None and y.dtype is dtype)
            return Formula(name, numbers[0], offset, dtypes, settings)
    return None


def _allowed(node: Any) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS and (node.target is not getattr or node.args[1] == "dtype")
    return node.op in ("placeholder", "get_attr", "output") or (node.op == "call_method" and node.target in _METHODS)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), device="cpu")


def _run(module: nn.Module, name: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The module's forward with random weights, on the CPU; None where it does not take x or gives no tensor."""
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.__dict__["_parameters"] = {name: nn.Parameter(_draw(x.shape[-1]).to(dtype), requires_grad=False)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            result = type(module).forward(probe, x.to(dtype))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None
    return result if isinstance(result, Tensor) else None


def _follows(module: nn.Module, name: str, width: int, eps: float, offset: float) -> bool:
    scale = offset + _draw(width).double()
    for x in (_draw(5, width), _draw(2, 3, width), _draw(2, 3, width) * eps**0.5):
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps) * scale
        found = _run(module, name, x, torch.float32)
        if found is None or found.shape != x.shape:
            return False
        if not float((found.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max()):
            return False
    return True
