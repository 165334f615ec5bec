"""cross_entropy and linear_cross_entropy with torch.nn.functional's signatures; re-exported by functional.py.

What the ops do not take (class probabilities, mistakes) goes to torch's own function: it has the semantics, and its
errors are the ones a caller of torch expects.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastlm import ops
from fastlm.nn._autocast import autocast_dtype


def fits(input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> bool:
    """Whether ops.cross_entropy takes this call."""
    if not (
        input.dim() >= 1
        and input.is_floating_point()
        and target.dtype is torch.int64
        and target.device == input.device
        and 0.0 <= label_smoothing <= 1.0
    ):
        return False
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if classes == 0 or target.shape != input.shape[:1][: input.dim() - 1] + input.shape[2:]:
        return False
    if weight is None:
        return True
    same = weight.dtype is input.dtype or autocast_dtype(input.device) is not None
    return same and weight.shape == (classes,) and weight.device == input.device and not weight.requires_grad


def like_torch(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 loss in the dtype torch returns: the logits', and float32 under autocast."""
    return loss.to(dtype) if autocast_dtype(loss.device) is None else loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy on fastlm.ops.cross_entropy.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ..., dK).
        target: class indices (), (N,) or (N, d1, ..., dK); or class probabilities of input's shape, which torch's own
            function serves.
        weight: (C,).
        size_average, reduce: deprecated, as in torch.
        ignore_index, reduction, label_smoothing: as in torch.

    Returns:
        The loss, in the dtype torch returns. Raises what torch raises.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum") or not fits(input, target, weight, label_smoothing):
        return torch.nn.functional.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    logits = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1)
    loss = ops.cross_entropy(
        logits.reshape(target.numel(), logits.shape[-1]),
        target.reshape(-1),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    loss = like_torch(loss, input.dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """torch.nn.functional.linear_cross_entropy (torch 2.13) on fastlm.ops.linear_cross_entropy, on any torch.

    Args:
        input: (in_features,) or (N, in_features).
        linear_weight: (C, in_features), or (C, d1, ..., dK, in_features) for the K-dimensional loss.
        target: class indices (), (N,) or (N, d1, ..., dK); or class probabilities of the logits' shape.
        linear_bias: (C,) or (C, d1, ..., dK).
        weight: (C,), class weights.
        reduction, label_smoothing: as in cross_entropy.
        ignore_index: None stands for -100, and must be None with class probabilities.
        options: torch's LinearCrossEntropyOptions. Accepted and not needed: the loss is always made in chunks.

    Returns:
        The loss, in the dtype torch returns. Class probabilities and the K-dimensional loss hold all logits at once.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    if input.dim() not in (1, 2):
        raise RuntimeError(f"input must have 1 or 2 dimensions, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"linear_weight must have at least 2 dimensions, got {linear_weight.dim()}")
    classes, places, channels = linear_weight.shape[0], linear_weight.shape[1:-1], linear_weight.shape[-1]
    if input.shape[-1] != channels:
        raise RuntimeError(
            f"input and linear_weight must end in the same in_features, got {input.shape[-1]} and {channels}"
        )
    if linear_bias is not None and linear_bias.shape != (classes, *places):
        raise RuntimeError(f"linear_bias must be {(classes, *places)}, got {tuple(linear_bias.shape)}")
    if places and input.dim() == 1:
        raise RuntimeError(
            f"linear_weight of shape {tuple(linear_weight.shape)} asks for a K-dimensional loss, which needs input "
            f"(N, {channels}), got {tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *places)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("ignore_index must be None when target holds class probabilities")
    ignored = -100 if ignore_index is None else ignore_index

    autocast = autocast_dtype(input.device) is not None
    alike = autocast or (
        linear_weight.dtype is input.dtype and (linear_bias is None or linear_bias.dtype is input.dtype)
    )
    rows_fit = not places and target.shape == input.shape[:-1] and classes > 0 and target.dtype is torch.int64
    weight_fits = weight is None or (
        weight.shape == (classes,)
        and weight.device == input.device
        and (weight.dtype is input.dtype or autocast)
        and not weight.requires_grad
    )
    devices = {t.device for t in (input, linear_weight, target, linear_bias) if t is not None}
    if (
        rows_fit
        and weight_fits
        and alike
        and len(devices) == 1
        and not input.is_meta
        and input.is_floating_point()
        and 0.0 <= label_smoothing <= 1.0
        and reduction in ("none", "mean", "sum")
    ):
        loss = ops.linear_cross_entropy(
            input.reshape(-1, channels),
            linear_weight,
            target.reshape(-1),
            linear_bias,
            class_weight=weight,
            ignore_index=ignored,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        loss = like_torch(loss, input.dtype)
        return loss.reshape(target.shape) if reduction == "none" else loss
    flat = linear_weight.reshape(math.prod(places, start=classes), channels)
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = torch.nn.functional.linear(input, flat, bias).reshape(shape)
    return cross_entropy(
        logits, target, weight=weight, ignore_index=ignored, reduction=reduction, label_smoothing=label_smoothing
    )
