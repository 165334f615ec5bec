"""Rotary position embedding of a transformers model: attention's own forward, with our op for the function it calls.

The function, apply_rotary_pos_emb, is found in the forward's globals: the forward runs with a copy of them. cos and sin
hold every angle twice; the model's rotary embedding, which makes them, hands on each angle once beside them, as an
attribute of the tensor, so that no layer has to look at the numbers. Tensors without it go to the stock function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf._probe import close, draw, foreign, stand_in
from fastlm.patching import STATE, Report, obstacle, swap
from fastlm.patching._layers import takes

_TABLE = f"{STATE}table"
# How cos and sin hold each angle twice: [0 1 2 0 1 2] or [0 0 1 1 2 2].
_LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "doubled": lambda table, half: table[..., :half],
    "paired": lambda table, half: table[..., ::2],
}


class Rotary(nn.Module):
    """The forward of a rotary embedding, whose results carry each angle once."""

    _fastlm_layout: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tables = super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            for table in tables:
                if not table.requires_grad:
                    half = _LAYOUTS[self._fastlm_layout](table, table.shape[-1] // 2)
                    wide = half if half.dtype is torch.float64 else half.float()
                    setattr(table, _TABLE, (self._fastlm_layout, wide.contiguous()))
        return tables


class RotaryAttention(nn.Module):
    """The forward of an attention with ops.rope in the place of its function."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward
        rebound = None if torch.compiler.is_compiling() else _rebind(stock.__func__)  # type: ignore[attr-defined]
        if rebound is None or isinstance(rebound, str):
            return stock(*args, **kwargs)
        return rebound(self, *args, **kwargs)


def apply(model: nn.Module, report: Report) -> None:
    """Replaces the rotary embedding of every attention whose function is known, and reports the others."""
    tables: set[str] = set()
    for _, module in model.named_modules():
        if "rotary" in type(module).__name__.lower() and obstacle(module) is None and foreign(module) is None:
            layout = _layout(module)
            if layout is not None:
                tables.add(layout)
                swap(module, Rotary)
                setattr(module, f"{STATE}layout", layout)
    for name, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward)
        if not _functions(forward):
            continue
        reason = obstacle(module) or foreign(module)
        if reason is None and not tables:
            reason = "the model has no rotary embedding that gives a known table of cos and sin"
        if reason is None:
            found = _rebind(type(module).forward)
            reason = found if isinstance(found, str) else None
        if reason is not None:
            report.leave(name, type(module).__name__, "rope", reason)
            continue
        report.replace(name, type(module).__name__, "rope", "ops.rope")
        swap(module, RotaryAttention)


def _layout(module: nn.Module) -> str | None:
    """How the module's cos and sin hold each angle twice, for each of its kinds of layer; None where they do not."""
    position_ids = torch.arange(2, 9)[None]
    config: Any = getattr(module, "config", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    arguments = (
        [(kind,) for kind in kinds] if "layer_type" in inspect.signature(type(module).forward).parameters else [()]
    )
    layouts = set(_LAYOUTS)
    for more in arguments:
        double = stand_in(module)
        double._buffers = {n: None if b is None else b.detach().cpu() for n, b in module._buffers.items()}
        try:
            with torch.no_grad():
                tables = type(module).forward(double, torch.zeros(1), position_ids, *more)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        if not isinstance(tables, tuple) or len(tables) != 2:
            return None
        for table in tables:
            if table.dim() != 3 or table.shape[:2] != (1, 7) or table.shape[-1] % 2:
                return None
            half = table.shape[-1] // 2
            pairs = {"doubled": table.unflatten(-1, (2, half)), "paired": table.unflatten(-1, (half, 2)).mT}
            layouts = {name for name in layouts if torch.equal(pairs[name][..., 0, :], pairs[name][..., 1, :])}
    return next((name for name in _LAYOUTS if name in layouts and arguments), None)


def _functions(forward: Any) -> list[str]:
    """The names by which a forward calls the functions that rotate."""
    code = getattr(forward, "__code__", None)
    names = () if code is None else code.co_names
    return [n for n in names if n.startswith("apply_rotary") and inspect.isfunction(forward.__globals__.get(n))]


@cache
def _rebind(forward: FunctionType) -> FunctionType | str:
    """The forward with ours for its functions, or why not. A function put in their place later is not seen: the copy
    of the globals is made once."""
    if hasattr(forward, "__wrapped__"):
        return "its forward is wrapped by a decorator"
    replaced = dict(forward.__globals__)
    for name in _functions(forward):
        stock = replaced[name]
        cases, widens = _cases(stock)
        if not cases:
            return f"its {name} is not the rotation of q and k that ops.rope computes"
        replaced[name] = _rotation(stock, cases, widens)
    rebound = FunctionType(forward.__code__, replaced, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound


def _rotation(stock: Callable[..., Any], cases: dict[tuple[str, int, bool], bool], widens: bool) -> Callable[..., Any]:
    """stock(q, k, cos, sin, unsqueeze_dim=1) by ops.rope in the cases that were found equal, else by itself."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        found, other = getattr(cos, _TABLE, None), getattr(sin, _TABLE, None)
        head = named.get("unsqueeze_dim", 1)
        if found is None or other is None or rest or named.keys() - {"unsqueeze_dim"} or not _fits(q, k, head):
            return stock(q, k, cos, sin, *rest, **named)
        layout, half = found
        interleaved = cases.get((layout, head, cos.shape[-1] < q.shape[-1]))
        if interleaved is None or half.shape[0] not in (1, q.shape[0]) or half.device != q.device:
            return stock(q, k, cos, sin, *rest, **named)
        if widens and cos.dtype is not q.dtype and not torch.is_autocast_enabled(q.device.type):
            # Under autocast the products that follow round to q's dtype in any case.
            dtype = torch.promote_types(q.dtype, cos.dtype)
            q, k = q.to(dtype), k.to(dtype)
        if head == 1:
            return ops.rope(q, k, half, other[1], interleaved=interleaved)
        q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), half, other[1], interleaved=interleaved)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def _fits(q: Tensor, k: Tensor, head: int) -> bool:
    """Whether q and k are (B, H, S, D), or (B, S, H, D) with the heads third, of one dtype and equal but for H."""
    if not takes(q) or not takes(k) or q.dim() != 4 or k.dim() != 4 or q.dtype is not k.dtype:
        return False
    a, b = q.shape, k.shape
    return a[0] == b[0] and a[3] == b[3] and head in (1, 2) and a[3 - head] == b[3 - head]


def _cases(stock: Callable[..., Any]) -> tuple[dict[tuple[str, int, bool], bool], bool]:
    """What the function computes, found by calling it.

    Returns:
        (layout of the table, unsqueeze_dim, whether channels are left over) -> whether pairs are interleaved, for each
        case in which it is ops.rope; and whether a result takes the wider dtype of q and cos, else that of q.
    """
    cases: dict[tuple[str, int, bool], bool] = {}
    widens = False
    for rotated, partial in ((16, False), (8, True)):
        q, k = draw(2, 3, 5, 16), draw(2, 2, 5, 16, seed=1)
        angles = draw(2, 5, rotated // 2, scale=2.0, seed=2)
        cos, sin = angles.cos(), angles.sin() * 1.5  # some families scale them
        for layout, head in ((layout, head) for layout in _LAYOUTS for head in (1, 2)):
            tables = [t.repeat(1, 1, 2) if layout == "doubled" else t.repeat_interleave(2, -1) for t in (cos, sin)]
            a, b = (q, k) if head == 1 else (q.transpose(1, 2), k.transpose(1, 2))
            with torch.no_grad():
                try:
                    found = stock(a, b, *tables, unsqueeze_dim=head)
                    widened = stock(a.bfloat16(), b.bfloat16(), *tables, unsqueeze_dim=head)[0].dtype is torch.float32
                except (RuntimeError, TypeError, ValueError, IndexError):
                    continue
                for interleaved in (False, True):
                    turned = ops.rope(q, k, cos, sin, interleaved=interleaved)
                    expected = turned if head == 1 else [t.transpose(1, 2) for t in turned]
                    if isinstance(found, tuple) and all(close(f, e) for f, e in zip(found, expected, strict=True)):
                        cases[layout, head, partial] = interleaved
                        widens = widened
    return cases, widens
