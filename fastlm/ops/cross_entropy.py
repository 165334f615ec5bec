"""cross_entropy over class indices, with gradient in the same pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_device, check_floating
from fastlm.ops._library import define, no_double_backward, nothing_listens

OP = Op(
    "cross_entropy",
    Backend("cpu", "fastlm.native.cross_entropy", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.cross_entropy", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.cross_entropy", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.cross_entropy"),
)

REDUCTIONS = ("none", "mean", "sum")


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stat = torch.float64 if logits.dtype is torch.float64 else torch.float32
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=stat)
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    return loss, logits.new_empty((3, *target.shape), dtype=stat), dlogits


def _fake_backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


_OPTIONS = "Tensor? weight, int ignore_index, str reduction, float label_smoothing, float z_loss, float? softcap"
_forward = define(
    OP,
    "forward",
    f"(Tensor logits, Tensor target, {_OPTIONS}, bool needs_grad, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    f"(Tensor dy, Tensor logits, Tensor target, {_OPTIONS}, Tensor stats, str backend) -> Tensor",
    _fake_backward,
)


def scale_gradients(op: Op, backend: str, dy: Tensor, *gradients: Tensor) -> None:
    """Multiplies gradients that were made for an upstream gradient of 1 by dy, which is nearly always 1.

    A CPU can look. A GPU's host would have to wait for it: there a kernel looks, instead of a pass over the logits.
    """
    if backend in ("triton", "cuda") and nothing_listens():
        for gradient in gradients:
            op.module(backend).scale(gradient, dy)
    elif dy.device.type != "cpu" or dy.item() != 1.0:
        for gradient in gradients:
            gradient.mul_(dy)


class _CrossEntropy(torch.autograd.Function):
    """Saves logits, target, weight and stats (3, M); and, where the forward made it, the gradient itself.

    The forward makes the gradient for the scalar reductions, taking the upstream gradient for 1; the backward scales it
    where it is not. Not for float16, whose loss scale must come before the rounding, nor in a compiled graph, which
    cannot hand over a tensor for good: there the backward reads the logits once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        overwrite: bool,
        backend: str,
    ) -> Tensor:
        options = (ignore_index, reduction, label_smoothing, z_loss, softcap)
        compiling, wanted = torch.compiler.is_compiling(), ctx.needs_input_grad[0]
        one_pass = wanted and reduction != "none" and logits.dtype is not torch.float16 and not compiling
        ctx.options, ctx.backend, ctx.spent, ctx.gradient = options, backend, False, None
        ctx.overwrite = overwrite and wanted and not compiling and nothing_listens()
        if ctx.overwrite:  # a library op that writes to its arguments would be slower for everyone
            loss, stats, _ = OP.module(backend).forward(
                logits, target, weight, *options, one_pass, logits if one_pass else None
            )
            ctx.logits = logits.detach()
            ctx.save_for_backward(target, weight, stats)
            if one_pass:
                ctx.gradient = ctx.logits
                torch.autograd.graph.increment_version(logits)  # whoever saved the logits must not trust them now
        else:
            loss, stats, dlogits = _forward(logits, target, weight, *options, one_pass, backend)
            ctx.gradient = dlogits if one_pass else None
            ctx.save_for_backward(target, weight, stats, logits)
        return loss

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        nothing = (None,) * 9
        if not ctx.needs_input_grad[0]:
            return None, *nothing
        if not torch.compiler.is_compiling():
            if ctx.overwrite and ctx.spent:
                raise RuntimeError(
                    "fastlm cross_entropy cannot run its backward twice with overwrite_logits=True: the first run gave "
                    "the logits' memory away; leave overwrite_logits off to use retain_graph"
                )
            # The gradient is handed over for good, so that a leaf can keep it without a copy; a second backward
            # makes it anew.
            dlogits, ctx.gradient, ctx.spent = ctx.gradient, None, True
            if dlogits is not None:
                scale_gradients(OP, ctx.backend, dy, dlogits)
                return dlogits, *nothing
        if ctx.overwrite:
            (target, weight, stats), logits = ctx.saved_tensors, ctx.logits
            OP.module(ctx.backend).backward(dy, logits, target, weight, *ctx.options, stats, logits)
            torch.autograd.graph.increment_version(logits)
            return logits, *nothing
        target, weight, stats, logits = ctx.saved_tensors
        return _backward(dy, logits, target, weight, *ctx.options, stats, ctx.backend), *nothing


def check_options(reduction: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be 0 or more, got {z_loss}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None leaves the logits alone")


def check_target(target: Tensor, M: int, classes: int, like: Tensor, like_name: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    if target.dtype is not torch.int64:
        raise TypeError(f"target must hold class indices of torch.int64, got {target.dtype}")
    check_device("target", target, like, like_name)
    if target.shape != (M,):
        raise ValueError(f"target must be ({M},), one label per row of {like_name}, got {tuple(target.shape)}")
    if classes == 0:
        raise ValueError("there must be at least one class, got a vocabulary of 0")


def check_class_weight(name: str, weight: Tensor | None, classes: int, like: Tensor, like_name: str) -> None:
    if weight is None:
        return
    check_floating(name, weight)
    check_device(name, weight, like, like_name)
    if weight.shape != (classes,):
        raise ValueError(f"{name} must be ({classes},), one number per class, got {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient: the loss has none for class weights")


def _check_overwrite(logits: Tensor) -> None:
    base = logits._base if logits._is_view() and logits._base is not None else logits
    if base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "overwrite_logits=True would destroy a leaf tensor that requires a gradient (or a view of one); "
            "logits must be an intermediate result nobody reads again"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise RuntimeError("overwrite_logits=True needs logits of their own memory, got an expanded tensor")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(logits) against class indices; loss and gradient in one pass over the logits.

    With z = softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118; z = logits without it), lse the log of the sum
    of exp(z), t the row's target, w the class weights and s the label smoothing (Szegedy et al. 2015,
    arXiv:1512.00567), a row's loss is

        w[t] * (1 - s) * (lse - z[t]) + s / V * sum_c w[c] * (lse - z[c]) + z_loss * w[t] * lse^2

    where the last term keeps lse near 0 (PaLM, arXiv:2204.02311). Rows whose target is ignore_index have loss 0 and no
    gradient. "mean" divides the sum by the sum of w[t] over the other rows, as torch does; with none left it is NaN
    and the gradient 0.

    Args:
        logits: (M, V), float32, bfloat16, float16 or float64, any row stride.
        target: (M,), int64, each in [0, V) or ignore_index.
        weight: (V,), any floating dtype; None stands for ones. Gets no gradient.
        ignore_index: the target of rows that do not count.
        reduction: "none", "mean" or "sum".
        label_smoothing: s, in [0, 1].
        z_loss: weight of lse^2, usually 1e-4.
        softcap: None, or the bound of the logits.
        overwrite_logits: allows the gradient to be written over the logits, which saves their size in memory. Call it
            only if nothing reads the logits again: after the call (reduction "none": after its backward) they hold the
            gradient. An operation that saved them for its own backward raises there; one backward is possible, a second
            raises. Not used in a compiled graph, where the compiler plans the memory.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        () or, for "none", (M,): float32 (float64 for float64), because a bfloat16 loss keeps three digits only.
        fastlm.nn.functional.cross_entropy returns the dtype torch would.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not agree.
        IndexError: a target is out of range ("cpu", and "reference" on the CPU; elsewhere the loss and gradient of its
            row, and the mean with every gradient, are NaN, to spare a host sync; nothing is read out of bounds).
        RuntimeError: overwrite_logits on a leaf that requires a gradient, a view of one or an expanded tensor.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: logits, target, weight and stats (3, M) in float32: the row's largest z, log of the sum of
    exp(z - largest), and 1 - softmax(z)[t]. No double backward.
    """
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (M, V), got {tuple(logits.shape)}")
    check_target(target, logits.shape[0], logits.shape[1], logits, "logits")
    check_class_weight("weight", weight, logits.shape[1], logits, "logits")
    check_options(reduction, label_smoothing, z_loss, softcap)
    name = OP.select(logits, backend)
    options = (ignore_index, reduction, float(label_smoothing), float(z_loss), softcap)
    if not torch.is_grad_enabled():
        return _forward(logits, target, weight, *options, False, name)[0]
    if overwrite_logits and not torch.compiler.is_compiling():
        _check_overwrite(logits)
    return _CrossEntropy.apply(logits, target, weight, *options, overwrite_logits, name)
