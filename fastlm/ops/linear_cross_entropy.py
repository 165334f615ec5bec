"""linear_cross_entropy: the language model's head and its loss, without ever holding all logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastlm import native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.native.linear_cross_entropy import two_passes
from fastlm.ops._check import check_choice, check_device, check_floating
from fastlm.ops._library import define, no_double_backward
from fastlm.ops.cross_entropy import check_class_weight, check_options, check_target, scale_gradients

OP = Op(
    "linear_cross_entropy",
    Backend("cpu", "fastlm.native.linear_cross_entropy", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend(
        "triton",
        "fastlm.kernels.linear_cross_entropy",
        _platform.DEVICES,
        LOW_PRECISION,
        features=frozenset({"fused", "gradient_filter"}),
        missing=_platform.missing,
    ),
    Backend("reference", "fastlm.reference.linear_cross_entropy"),
)


def _statistics(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _fake_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    stat = _statistics(hidden)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=stat),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=stat),
    )


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    implementation: str,
    gradient_filter: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stat = _statistics(hidden)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=stat)
    stats = hidden.new_empty((3, *target.shape), dtype=stat)
    return loss, stats, *_fake_gradients(hidden, weight, needs)


def _fake_backward(
    dy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = _fake_gradients(hidden, weight, rest[-1])
    return dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index, str reduction,"
    " float label_smoothing, float z_loss, float? softcap, str implementation, float? gradient_filter"
)
_forward = define(
    OP,
    "forward",
    f"({_INPUTS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    OP,
    "backward",
    f"(Tensor dy, {_INPUTS}, Tensor stats, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves hidden, weight, bias, target, class_weight, stats (3, M); and the gradients where the forward made them.

    The forward makes them for the scalar reductions, chunk by chunk, taking the upstream gradient for 1, those of
    weight and bias in float32. Not for float16, whose loss scale must come before the rounding: there, for "none", in a
    second backward, in the fused form and where the CPU walks the classes, the backward makes the logits anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        implementation: str,
        gradient_filter: float | None,
        backend: str,
    ) -> Tensor:
        options = (ignore_index, reduction, label_smoothing, z_loss, softcap, implementation, gradient_filter)
        needs = list(ctx.needs_input_grad[:3])
        chunked = implementation == "chunked"
        ahead = any(needs) and chunked and reduction != "none" and hidden.dtype is not torch.float16
        if backend == "cpu" and two_passes(hidden, weight):
            ahead = False
        now = needs if ahead else [False, False, False]
        loss, stats, *gradients = _forward(hidden, weight, bias, target, class_weight, *options, now, backend)
        ctx.options, ctx.needs, ctx.backend, ctx.gradients = options, needs, backend, None
        ctx.ahead_in_graph = ahead and torch.compiler.is_compiling()
        if ctx.ahead_in_graph:  # a compiled graph cannot hand tensors over for good; it keeps them and multiplies
            ctx.save_for_backward(hidden, weight, bias, target, class_weight, stats, *gradients)
        else:
            ctx.gradients = gradients if ahead else None
            ctx.save_for_backward(hidden, weight, bias, target, class_weight, stats)
        return loss

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        hidden, weight, bias, target, class_weight, stats, *kept = ctx.saved_tensors
        if ctx.ahead_in_graph:
            gradients = [(g * dy).to(g.dtype) for g in kept]
        elif ctx.gradients is not None:  # handed over for good, so that leaves can keep them without a copy
            gradients, ctx.gradients = ctx.gradients, None
            scale_gradients(OP, ctx.backend, dy, *gradients)
        else:
            gradients = list(
                _backward(
                    dy, hidden, weight, bias, target, class_weight, *ctx.options, stats, ctx.needs, ctx.backend
                )
            )  # fmt: skip
        dhidden, dweight, dbias = gradients
        del gradients, kept
        return (
            dhidden if ctx.needs[0] else None,
            dweight.to(weight.dtype) if ctx.needs[1] else None,
            dbias.to(bias.dtype) if ctx.needs[2] and bias is not None else None,
            *(None,) * 10,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    implementation: Literal["chunked", "fused"] | None = None,
    gradient_filter: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight.T + bias, target) without ever holding all logits. Exact unless filtered.

    "chunked" makes the logits of a chunk of rows at a time, and the gradients in the forward, while they are at hand:
    three matrix products, at the speed of torch's. The chunk is chosen inside (at most 150 MB on a CPU, up to half a
    gigabyte on a GPU); the weight's gradient is summed over the chunks in float32. On a CPU in the half types it makes
    the logits of a slice of classes at a time, 16 MB, in the forward and again in the backward: four products, no sum.
    "fused" makes the logits a tile at a time, in registers, in the forward and twice more in the backward: five
    products, and no memory beside the gradients, their float32 sums and some numbers a row (cut cross-entropy, Wijmans
    et al. 2024, arXiv:2411.09009, but without its filter unless asked for). Deterministic, too.

    Args:
        hidden: (M, C), float32, bfloat16, float16 or float64. The matrix products run in this dtype; under autocast, in
            autocast's.
        weight: (V, C), any floating dtype; a float32 weight keeps its float32 gradient under bfloat16 products.
        target: (M,), int64, each in [0, V) or ignore_index.
        bias: (V,) or None.
        class_weight: (V,), the `weight` of cross_entropy.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as in cross_entropy.
        implementation: "chunked", "fused", or None: the faster one, which is "fused" where gradient_filter is given and
            else "chunked". Take "fused" where the chunk is what no longer fits.
        gradient_filter: None, or the bound below which gradients are dropped: a tile of 128 rows x 128 classes (64 x 64
            where hidden has 4 or 8 bytes), counted from 0, gets none where every |softmax(z) - onehot| in it is below
            the bound; smoothing's and z-loss's parts go with the rest. The loss stays exact. 2^-12 is what bfloat16
            does not see beside 1. Not with "chunked".
        backend: "cpu" (chunked only), "triton" or "reference"; None chooses.

    Returns:
        () or, for "none", (M,): float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options do not agree.
        IndexError: a target is out of range (where cross_entropy raises it; elsewhere its row and the mean are NaN).
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: hidden, weight, bias, target, class_weight, stats (3, M) as cross_entropy, and the gradients
    of those of hidden, weight and bias that require one. No double backward.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_device("weight", weight, hidden, "hidden")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (M, C), got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be (V, {hidden.shape[1]}) like the columns of hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_floating("bias", bias)
        check_device("bias", bias, hidden, "hidden")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},) like the rows of weight, got {tuple(bias.shape)}")
    check_target(target, hidden.shape[0], weight.shape[0], hidden, "hidden")
    check_class_weight("class_weight", class_weight, weight.shape[0], hidden, "hidden")
    check_options(reduction, label_smoothing, z_loss, softcap)
    if implementation is None:
        implementation = "chunked" if gradient_filter is None else "fused"
    check_choice("implementation", implementation, "chunked", "fused")
    if gradient_filter is not None:
        if implementation != "fused":
            raise ValueError(f"gradient_filter needs implementation='fused', got {implementation!r}")
        if not 0.0 < gradient_filter < 1.0:
            raise ValueError(f"gradient_filter must lie between 0 and 1, got {gradient_filter}; None drops nothing")
        gradient_filter = float(gradient_filter)
    features = {"fused"} if implementation == "fused" else set()
    if gradient_filter is not None:
        features.add("gradient_filter")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    name = OP.select(hidden, backend, frozenset(features))
    options = (
        ignore_index, reduction, float(label_smoothing), float(z_loss), softcap, implementation, gradient_filter
    )  # fmt: skip
    if not torch.is_grad_enabled():
        return _forward(hidden, weight, bias, target, class_weight, *options, [False] * 3, name)[0]
    return _LinearCrossEntropy.apply(hidden, weight, bias, target, class_weight, *options, name)
