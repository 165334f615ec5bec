"""kl_div of two rows of logits, for distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_choice, check_device, check_floating
from fastlm.ops._library import define, no_double_backward

# No row for "cpu" yet.
OP = Op(
    "kl_div",
    Backend("triton", "fastlm.kernels.kl_div", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("reference", "fastlm.reference.kl_div"),
)


def _fake_forward(
    logits: Tensor, target: Tensor, mask: Tensor | None, temperature: float, reduction: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    rows, stat = logits.shape[:-1], torch.float64 if logits.dtype is torch.float64 else torch.float32
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=stat)
    return loss, logits.new_empty((5, rows.numel()), dtype=stat)


def _fake_backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    reduction: str,
    reverse: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


_OPTIONS = "float temperature, str reduction, bool reverse, str backend"
_forward = define(
    OP, "forward", f"(Tensor logits, Tensor target, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)", _fake_forward
)
_backward = define(
    OP,
    "backward",
    f"(Tensor dy, Tensor logits, Tensor target, Tensor? mask, Tensor stats, {_OPTIONS}) -> Tensor",
    _fake_backward,
)


class _KlDiv(torch.autograd.Function):
    """Saves logits, target, mask and stats (5, M)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, mask: Tensor | None, *options: Any) -> Any:
        loss, stats = _forward(logits, target, mask, *options)
        ctx.save_for_backward(logits, target, mask, stats)
        ctx.options = options
        return loss

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


def kl_div(
    logits: Tensor,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    reverse: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of a student's classes from a teacher's, from the logits of both.

    With p = softmax(target_logits / T) and q = softmax(logits / T) a row's loss is KL(p || q) = sum_c p log(p / q), or
    with reverse KL(q || p) = sum_c q log(q / p), taking 0 log 0 for 0. Neither p nor q is ever in memory. Distillation
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531) multiplies the loss by T^2, which is left to the caller. The
    reverse form is that of MiniLLM (Gu et al. 2023, arXiv:2306.08543). Computes in float32 (float64 for float64).

    Args:
        logits: (..., V), the student's; float32, bfloat16, float16 or float64; any strides, a copy is made unless the
            last is 1. The only argument with a gradient.
        target_logits: (..., V), the teacher's, any floating dtype. -inf is a class that cannot be; where p > 0 and
            q = 0 (with reverse the other way round) the loss is infinite.
        temperature: T, above 0.
        reduction: "none" for a loss per row, "sum", or "batchmean" for the mean over rows.
        reverse: whether the student's probabilities weigh the logarithms.
        mask: (...), bool, True for rows that count, or None for all. The others have loss 0 and no gradient;
            "batchmean" divides by the number of those that count: with none left it is NaN and the gradient 0.
        backend: "triton" or "reference"; None chooses.

    Returns:
        () or, for "none", (...): float32 (float64 for float64), because a bfloat16 loss keeps three digits only.

    Raises:
        ValueError: shapes, devices or options do not agree, or target_logits requires a gradient.
        TypeError: logits are not floating point, or mask is not bool.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: logits, target_logits, mask and stats (5, M) in float32: of logits / T and of target_logits / T
    each the row's largest element and the log of the sum of exp(element - largest), and the row's loss. No double
    backward.
    """
    check_floating("logits", logits)
    check_floating("target_logits", target_logits)
    check_device("target_logits", target_logits, logits, "logits")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with at least one class, got {tuple(logits.shape)}")
    if target_logits.shape != logits.shape:
        raise ValueError(f"target_logits must be {tuple(logits.shape)} like logits, got {tuple(target_logits.shape)}")
    if target_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("target_logits must not require a gradient: kl_div has none for it; pass target.detach()")
    check_choice("reduction", reduction, "none", "sum", "batchmean")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            raise TypeError(f"mask must be a Tensor of torch.bool, got {getattr(mask, 'dtype', type(mask).__name__)}")
        check_device("mask", mask, logits, "logits")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"mask must be {tuple(logits.shape[:-1])}, one for a row, got {tuple(mask.shape)}")
    options = (float(temperature), reduction, reverse, OP.select(logits, backend))
    if torch.is_grad_enabled():
        return _KlDiv.apply(logits, target_logits, mask, *options)
    return _forward(logits, target_logits, mask, *options)[0]
