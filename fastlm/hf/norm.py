"""LayerNorm and RMSNorm of a transformers model: torch's classes, and those that each family writes anew."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fastlm.nn
from fastlm import ops
from fastlm.hf._probe import close, draw, foreign, stand_in
from fastlm.patching import STATE, LayerNorm, Report, obstacle, swap
from fastlm.patching._layers import takes

_FORMULA = f"{STATE}formula"
_EPS = ("variance_epsilon", "eps", "epsilon")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Formula:
    """What a family's norm computes.

    Attributes:
        mean: whether the mean is subtracted: LayerNorm, else RMSNorm.
        eps: the attribute that holds it.
        offset: added to the weight: 1 in Gemma's (1 + weight).
        results: dtypes of input and weight (None without one) -> dtype of the result. Families round in different
            places, which shows in a result's dtype where the two are not one.
    """

    mean: bool
    eps: str
    offset: float
    results: dict[tuple[torch.dtype, torch.dtype | None], torch.dtype]

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if self.mean:
            return ops.layer_norm(x, weight, bias, eps)
        return ops.rms_norm(x, weight, eps, offset=self.offset)


class FamilyNorm(nn.Module):
    """The forward of a norm that follows a Formula, rounded once, at the end."""

    _fastlm_formula: Formula

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        formula = self._fastlm_formula
        weight: Any = getattr(self, "weight", None)
        if len(args) == 1 and not kwargs and takes(args[0]):
            x = args[0]
            result = formula.results.get((x.dtype, None if weight is None else weight.dtype))
            if result is not None and (weight is None or x.shape[-1:] == weight.shape):
                x = x.to(torch.promote_types(x.dtype, result))
                bias: Any = getattr(self, "bias", None) if formula.mean else None
                return formula(x, weight, bias, getattr(self, formula.eps)).to(result)
        return super().forward(*args, **kwargs)


def apply(model: nn.Module, report: Report) -> None:
    """Replaces every norm whose formula is known, and reports the others."""
    known: dict[Any, Formula | str] = {}
    for name, module in model.named_modules():
        if not _candidate(module):
            continue
        kind = type(module).__name__
        reason = obstacle(module) or foreign(module)
        if reason is not None:
            report.leave(name, kind, "norm", reason)
        elif type(module).forward is nn.LayerNorm.forward:
            swap(module, LayerNorm)
            report.replace(name, kind, "norm", "ops.layer_norm", "on a CPU, long inputs in half types")
        elif type(module).forward is nn.RMSNorm.forward:
            swap(module, fastlm.nn.RMSNorm)
            report.replace(name, kind, "norm", "nn.RMSNorm")
        else:
            key = _key(module)
            if key not in known:
                known[key] = formula(module)
            found = known[key]
            if isinstance(found, str):
                report.leave(name, kind, "norm", found)
                continue
            swap(module, FamilyNorm)
            setattr(module, _FORMULA, found)
            scale = "" if found.offset == 0.0 else " with 1 + weight"
            report.replace(name, kind, "norm", "ops.layer_norm" if found.mean else "ops.rms_norm" + scale)


def _candidate(module: nn.Module) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    named = "norm" in type(module).__name__.lower() and not type(module).__module__.startswith("torch.nn.")
    return named and not module._buffers and not any(module.children())


def _key(module: nn.Module) -> Any:
    """What two modules share that compute the same but for their parameters."""
    shapes = tuple((name, p is not None and p.shape) for name, p in module._parameters.items())
    attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
    return type(module), shapes, tuple(sorted((k, repr(v)) for k, v in attributes.items()))


def formula(module: nn.Module) -> Formula | str:
    """The formula of a norm, found by its own forward on small numbers; or why it has none."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not set(parameters) <= {"weight", "bias"} or any(p.dim() != 1 for p in parameters.values()):
        return "its parameters are not a weight and a bias of one dimension"
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if eps is None:
        return f"it has none of {', '.join(_EPS)}"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the hidden states"
    width = next((p.shape[0] for p in parameters.values()), 8)
    for mean, offset in ((False, 0.0), (False, 1.0), (True, 0.0)):
        candidate = Formula(mean, eps, offset, {})
        if all(_follows(candidate, module, width, value) for value in (1e-6, 0.1)):
            return Formula(mean, eps, offset, _results(candidate, module, width))
    return "it computes neither LayerNorm nor RMSNorm"


def _double(module: nn.Module, width: int, eps_name: str, eps: float, dtype: torch.dtype) -> nn.Module:
    """The module with small random parameters and another eps."""
    own = module._parameters
    seeds = {name: seed for seed, name in enumerate(own, start=1)}
    fresh = {n: None if p is None else nn.Parameter(draw(width, seed=seeds[n]).to(dtype)) for n, p in own.items()}
    double = stand_in(module, parameters=fresh)
    double.__dict__[eps_name] = eps
    return double


def _follows(candidate: Formula, module: nn.Module, width: int, eps: float) -> bool:
    """Whether the module's results and gradients are the candidate's in float32, with inputs as small as eps too."""
    double = _double(module, width, candidate.eps, eps, torch.float32)
    weight, bias = double._parameters.get("weight"), double._parameters.get("bias")
    parameters = [p for p in (weight, bias) if p is not None]
    for scale in (1.0, eps**0.5):
        with torch.inference_mode(False), torch.enable_grad():
            x = draw(2, 3, width, scale=scale).add_(0.3 * scale).requires_grad_()
            upstream = draw(2, 3, width, seed=9)
            try:
                stock = type(module).forward(double, x)
            except (RuntimeError, ValueError, TypeError):
                return False
            ours = candidate(x, weight, bias, eps)
            if not close(stock, ours):
                return False
            wanted = torch.autograd.grad(ours, [x, *parameters], upstream)
            found = torch.autograd.grad(stock, [x, *parameters], upstream, allow_unused=True)
        if not all(close(f, w) for f, w in zip(found, wanted, strict=True)):
            return False
    return True


def _results(
    candidate: Formula, module: nn.Module, width: int
) -> dict[tuple[torch.dtype, torch.dtype | None], torch.dtype]:
    """The dtype of the module's result for each pair of dtypes that it takes."""
    results: dict[tuple[torch.dtype, torch.dtype | None], torch.dtype] = {}
    weighted = any(p is not None for p in module._parameters.values())
    for dtype, scale in product(_DTYPES, _DTYPES if weighted else (None,)):
        double = _double(module, width, candidate.eps, 1e-6, scale or torch.float32)
        with torch.no_grad():
            try:
                found = type(module).forward(double, draw(2, width).to(dtype))
            except RuntimeError:
                continue
        results[dtype, scale] = found.dtype
    return results
