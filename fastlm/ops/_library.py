"""The pattern every op follows: a pair of torch.library ops around a backend's forward() and backward(), called from
one old-style autograd.Function.

Measured on a small layer_norm: register_autograd and setup_context cost 40 to 60 us a call more than this. The library
ops make torch.compile(fullgraph=True) work, because raw pointers cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    implementations: dict[str, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        found = implementations.get(args[-1])
        if found is None:
            found = implementations[args[-1]] = getattr(op.module(args[-1]), function)
        return found(*args[:-1])

    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    library_op = getattr(torch.ops.fastlm, name).default
    if library_op._schema.is_mutable:  # the dispatcher counts the versions of what it writes to
        return library_op

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not nothing_listens() or not _plain(args):
            return library_op(*args)
        found = implementations.get(args[-1])
        return run(*args) if found is None else found(*args[:-1])

    return call


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype})


def _plain(args: Iterable[Any]) -> bool:
    """Whether no argument, nor what a list among them holds, is a tensor subclass."""
    if _PLAIN.issuperset(map(type, args)):
        return True
    return all(type(a) in _PLAIN or (type(a) is list and _plain(a)) for a in args)


_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_transforms = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch.autograd._profiler_enabled


def nothing_listens() -> bool:
    """Whether a call may go straight to the backend, past torch's dispatcher, which takes as long as a small kernel.

    It may not while someone traces, transforms or records calls (fake tensors, functorch, jit.trace, the profiler), nor
    on a tensor subclass. Function modes do not matter: they see fastlm.ops' own calls to torch in either case.
    """
    return not (
        _dispatch_modes() or _functorch_transforms() or _tracing_state() is not None or _profiler_enabled()
    )  # fmt: skip


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype), which costs a microsecond even where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def distinct(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, a view of each that came before: dynamo refuses one given twice to an autograd.Function."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[torch.Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return tuple(found)


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
        delayed = torch._C._functions.DelayedError(message, len(tensors))(*tensors)
        guards = iter(delayed if isinstance(delayed, tuple) else (delayed,))
        return tuple(next(guards) if isinstance(r, torch.Tensor) else r for r in results)

    return guarded
