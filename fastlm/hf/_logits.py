"""Logits that nobody has made yet: what a patched head returns in a training step.

A model's own code goes on with them, whatever it does: casts, shifts, flattens, scales or caps them, and hands them to
whichever loss it has. The steps that have a fused form are noted here; torch's cross_entropy then runs as one op from
the head's input, and the logits never exist. At any other use they are made by the very calls that stock would have
made, so that nothing has to be known about the model, and no use of them can go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastlm import nn as fnn
from fastlm import ops
from fastlm.nn._losses import fits, like_torch
from fastlm.ops._library import no_double_backward


class _Head:
    """The call of a head that was put off: its input, its parameters, and the function of the three."""

    def __init__(self, linear: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.linear, self.hidden, self.weight, self.bias = linear, hidden, weight, bias
        self.leaves = tuple(t for t in (hidden, weight, bias) if t is not None)
        self.versions = self._versions()
        device = hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = hidden.dtype
        if self.autocast is not None and hidden.dtype is not torch.float64:
            self.dtype = self.autocast
        self.made: Tensor | None = None
        self.made_of: tuple[Tensor, ...] = ()
        self.maker = ""
        self.fused: tuple[float, float | None] | None = None

    def _versions(self) -> list[int]:
        return [t._version for t in self.leaves]

    def check(self) -> None:
        if self.versions != self._versions():
            raise RuntimeError(
                "the logits of this training step were not made, and the head's weight or input has changed since: "
                "read outputs.logits before optimizer.step(), or call fastlm.hf.enable(model, loss=False)"
            )

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast of the head's call: the loss may run outside it."""
        return torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def logits(self) -> Tensor:
        if self.made is None:
            self.check()
            with torch.enable_grad(), self.precision():
                # Views, since a tied weight is reached through hidden, too, and _Enter must not count that.
                self.made_of = (self.hidden, *(t.view_as(t) for t in self.leaves[1:]))
                self.made = self.linear(*self.made_of)
        return self.made


@dataclass
class _Noted:
    """A value that follows from the head's logits z = hidden weight^T + bias.

    It is `scale` z, or `scale` tanh(`inner` z) where inner is a number, of the rows that `hidden` holds. `make` makes
    it by the model's own calls.
    """

    head: _Head
    hidden: Tensor
    bias: Tensor | None
    make: Callable[[], Tensor]
    scale: float = 1.0
    inner: float | None = None
    made: Tensor | None = None

    def full(self) -> Tensor:
        if self.made is None:
            with torch.enable_grad():
                self.made = self.make()
        return self.made

    def cross_entropy(self, target: Tensor, **options: Any) -> Tensor:
        head, factor, softcap = self.head, self.scale, None
        if self.inner is not None:  # scale tanh(inner z) is softcap tanh(factor z / softcap)
            factor, softcap = self.inner * self.scale, self.scale
        hidden, bias = self.hidden.reshape(-1, self.hidden.shape[-1]), self.bias
        if abs(factor - 1.0) > 1e-12:
            hidden, bias = hidden * factor, None if bias is None else bias * factor
        head.check()
        head.fused = factor, softcap
        with head.precision():
            return ops.linear_cross_entropy(hidden, head.weight, target.reshape(-1), bias, softcap=softcap, **options)


class _Enter(torch.autograd.Function):
    """Ties the empty tensor to the graph, for the uses that only C++ sees, such as another autograd.Function."""

    @staticmethod
    def forward(ctx: Any, noted: _Noted, shape: tuple[int, ...], dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        ctx.noted = noted
        device = noted.hidden.device
        return cast(Tensor, Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=device))

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        full, needs = ctx.noted.full(), ctx.needs_input_grad[3:]
        leaves = [leaf for leaf, need in zip(ctx.noted.head.made_of, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(full, leaves, dy, retain_graph=True))
        return None, None, None, *(next(gradients) if need else None for need in needs)


class DeferredLogits(Tensor):
    """A tensor of logits, or of what a model made of them, that gets its elements when they are first needed."""

    _noted: _Noted

    @classmethod
    def of(cls, linear: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits linear(hidden, weight, bias), not made yet."""
        head = _Head(linear, hidden, weight, bias)
        return cls._enter(_Noted(head, hidden, bias, head.logits), weight.shape[0], head.dtype)

    @property
    def fused(self) -> tuple[float, float | None] | None:
        """Factor and softcap of the logits in the loss that ran without them; None where there was none."""
        return self._noted.head.fused

    @property
    def maker(self) -> str:
        """The function for which they were made, or ""."""
        return self._noted.head.maker

    @classmethod
    def _enter(cls, noted: _Noted, classes: int, dtype: torch.dtype) -> DeferredLogits:
        with torch.enable_grad():
            shape = (*noted.hidden.shape[:-1], classes)
            logits: DeferredLogits = _Enter.apply(noted, shape, dtype, *noted.head.leaves)
        logits._noted = noted
        return logits

    def _then(self, dtype: torch.dtype | None = None, **changes: Any) -> DeferredLogits:
        return self._enter(replace(self._noted, made=None, **changes), self.shape[-1], dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _STEPS.get(func) if torch.is_grad_enabled() else None  # off inside an autograd.Function
        if step is not None and args and isinstance(args[0], cls) and args[0]._noted.head.made is None:
            result = step(*args, **kwargs)
            if isinstance(result, cls) and result is not args[0]:
                before, rest = args[0]._noted, args[1:]
                result._noted.make = lambda: func(before.full(), *rest, **kwargs)
            if result is not None:
                return result
        for logits in tree_leaves((args, kwargs)):
            if isinstance(logits, cls) and logits._noted.head.made is None:
                logits._noted.head.maker = getattr(func, "__name__", str(func))
        args, kwargs = tree_map_only(cls, lambda logits: logits._noted.full(), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, lambda logits: logits._noted.full().detach(), (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


# What a model does to logits on their way to the loss. A step returns None where its form is not the one known here.


def _float(logits: DeferredLogits) -> Tensor | None:
    return logits if logits.dtype is torch.float32 else logits._then(torch.float32)


def _to(logits: DeferredLogits, other: Any) -> Tensor | None:
    if isinstance(other, torch.dtype) and other.is_floating_point:
        return logits if other is logits.dtype else logits._then(other)
    return logits if isinstance(other, torch.device) and other == logits.device else None


def _contiguous(logits: DeferredLogits) -> Tensor | None:
    return logits


def _view(logits: DeferredLogits, *shape: Any) -> Tensor | None:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) < 2 or sizes[-1] != logits.shape[-1]:
        return None
    hidden = logits._noted.hidden
    return logits._then(hidden=hidden.reshape(*sizes[:-1], hidden.shape[-1]))


def _getitem(logits: DeferredLogits, index: Any) -> Tensor | None:
    """Rows by slices and numbers; the classes stay."""
    index = index if isinstance(index, tuple) else (index,)
    if any(type(i) not in (slice, int, type(Ellipsis)) for i in index):
        return None
    if index.count(Ellipsis) > 1 or len(index) - index.count(Ellipsis) > logits.dim():
        return None
    touches_classes = index[-1] is not Ellipsis if Ellipsis in index else len(index) == logits.dim()
    if touches_classes and index[-1] != slice(None):
        return None
    return logits._then(hidden=logits._noted.hidden[index])


def _multiply(logits: DeferredLogits, factor: Any) -> Tensor | None:
    return logits._then(scale=logits._noted.scale * factor) if isinstance(factor, (int, float)) else None


def _divide(logits: DeferredLogits, divisor: Any) -> Tensor | None:
    return _multiply(logits, 1.0 / divisor) if isinstance(divisor, (int, float)) and divisor else None


def _tanh(logits: DeferredLogits) -> Tensor | None:
    noted = logits._noted
    return None if noted.inner is not None else logits._then(scale=1.0, inner=noted.scale)


def _add(logits: DeferredLogits, other: Any) -> Tensor | None:
    """A constant bias, as BART's."""
    noted, classes = logits._noted, logits.shape[-1]
    plain = isinstance(other, Tensor) and not other.requires_grad and other.is_floating_point()
    if not plain or other.shape != (1,) * (other.dim() - 1) + (classes,) or not 0 < other.dim() <= logits.dim():
        return None
    if noted.scale != 1.0 or noted.inner is not None or other.device != logits.device:
        return None
    bias = other.reshape(-1) if noted.bias is None else noted.bias + other.reshape(-1)
    return logits._then(torch.promote_types(logits.dtype, other.dtype), bias=bias)


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    noted = logits._noted
    if logits.dim() > 2 or not fits(logits, target, weight, label_smoothing) or (size_average, reduce) != (None, None):
        return None
    if reduction not in ("none", "mean", "sum") or (noted.inner is not None and noted.scale <= 0.0):
        return None
    loss = noted.cross_entropy(
        target,
        class_weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    loss = like_torch(loss, logits.dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


_STEPS: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.__getitem__: _getitem,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    torch.div: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.add: _add,
    Tensor.__add__: _add,
    torch.add: _add,
    torch.nn.functional.cross_entropy: _cross_entropy,
    fnn.functional.cross_entropy: _cross_entropy,
}
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad",
        "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested",
    )),
    *(getattr(Tensor, name) for name in (
        "size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "__len__",
    )),
}  # fmt: skip
