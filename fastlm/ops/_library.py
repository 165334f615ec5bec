"""The pattern every op follows: a pair of torch.library ops around a backend's forward() and backward(), called from
one old-style autograd.Function.

Measured on a small layer_norm: register_autograd and setup_context cost 40 to 60 us a call more than this. The library
ops make torch.compile(fullgraph=True) work, because raw pointers cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from fastlm._dispatch import Op

_LIBRARY = torch.library.Library("fastlm", "DEF")


def define(op: Op, function: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers fastlm::<op>_<function> and returns it.

    Args:
        op: its table of backends; the last argument of the schema must be `str backend`.
        function: name of the function in the backends' modules, "forward" or "backward".
        schema: "(Tensor x, ..., str backend) -> (Tensor, ...)".
        fake: the same function on fake tensors: shapes, dtypes and strides of the results only. Takes no backend.
    """
    name = f"{op.name}_{function}"

    def run(*args: Any) -> Any:
        return getattr(op.module(args[-1]), function)(*args[:-1])

    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    return getattr(torch.ops.fastlm, name).default


def no_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a second derivative through the gradients an error.

    torch's once_differentiable drops second-order terms silently when the upstream gradient needs no gradient.
    """
    name = backward.__qualname__.split(".")[0].lstrip("_")

    @wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        results = results if isinstance(results, tuple) else (results,)
        tensors = [r.detach().requires_grad_() for r in results if isinstance(r, torch.Tensor)]
        message = f"fastlm {name} does not support double backward; differentiate the same formula written in PyTorch"
        # A private binding, but the one once_differentiable itself is built on.
        guarded = torch._C._functions.DelayedError(message, len(tensors))(*tensors)
        guards = iter(guarded if isinstance(guarded, tuple) else (guarded,))
        return tuple(next(guards) if isinstance(r, torch.Tensor) else r for r in results)

    return guarded
