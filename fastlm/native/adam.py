"""prepare(), forward() and norm() of adam over the C++ extension.

With fifty tensors the Python around a step costs as much as the step, so addresses are taken and checked once, by
prepare(), and kept for as long as current() finds them unchanged. Gradients are new tensors at each step: those are
checked each time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._walk import Walk, dense
from fastlm.native import DTYPES, address, empty, extension, threads

F32 = torch.float32


def _pointer(values: array[int]) -> int:
    return values.buffer_info()[0]


class Prepared:
    """The tensors of one call in the order the kernel walks them, and their addresses. There are no 8-bit states here:
    the last two lists are empty."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        master_params: Sequence[Tensor],
        seeds: Sequence[int],
        exp_avg_absmaxes: Sequence[Tensor],
        exp_avg_sq_absmaxes: Sequence[Tensor],
    ) -> None:
        self.dtype = params[0].dtype
        self.stochastic = bool(seeds)
        self.walk = Walk(params)
        for step in steps:
            address("step", step, F32)
        rows = [array("q", self.walk.sizes), array("q", [s.data_ptr() for s in steps])]
        names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
        self.lists = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params)
        for name, tensors in zip(names, self.lists, strict=True):
            for tensor in tensors:
                address(name, tensor, self.dtype if name == "param" else F32, contiguous=False)
            walked = self.walk.along(tensors)
            rows.append(array("q", [w.data_ptr() for w in walked] or [0] * len(params)))
        rows.append(array("q", seeds or [0] * len(params)))
        self.table = array("q")
        for row in rows:
            self.table.extend(row)
        self.walk.watch(*self.lists[1:], steps)

    def current(self) -> bool:
        return self.walk.current()


def forward(
    prepared: Prepared,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if found_inf is not None and found_inf.item():
        return
    walk = prepared.walk
    dtype = grads[0].dtype if grads[0].dtype in (prepared.dtype, F32) else F32
    kept = [_gradient(g, dtype, walk, i) for i, g in enumerate(grads)]
    addresses = array("q", [g.data_ptr() for g in kept])
    scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    walk.begin()
    extension().adam_step(
        DTYPES[prepared.dtype], DTYPES[dtype], _pointer(prepared.table), _pointer(addresses), len(kept),
        float(lr), beta1, beta2, eps, weight_decay, decoupled, -scale if maximize else scale, prepared.stochastic,
        threads(),
    )  # fmt: skip
    walk.end()


def _gradient(grad: Tensor, dtype: torch.dtype, walk: Walk, index: int) -> Tensor:
    """The gradient as the kernel reads it: real, of this dtype, in the parameter's memory order."""
    if (
        walk.strides[index] is None and type(grad) is Tensor and grad.dtype is dtype and grad.is_cpu
        and grad.layout is torch.strided and grad.is_contiguous() and not grad.is_neg()
        and grad.numel() == walk.sizes[index]
    ):  # fmt: skip
        return grad
    if grad.is_neg():
        grad = grad.resolve_neg()
    address("grad", grad, *DTYPES, contiguous=False)
    return walk.gradient(grad, dtype, index)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    dtype = grads[0].dtype
    kept = []
    for grad in grads:
        if grad.is_neg() or not dense(grad):
            grad = grad.resolve_neg().contiguous()
        if type(grad) is not Tensor or grad.dtype is not dtype or not grad.is_cpu or grad.layout is not torch.strided:
            address("grad", grad, dtype, contiguous=False)
        kept.append(grad)
    addresses = array("q", [g.data_ptr() for g in kept])
    sizes = array("q", [g.numel() for g in kept])
    result = empty((), torch.float64)
    extension().adam_norm(
        DTYPES[dtype],
        _pointer(addresses),
        _pointer(sizes),
        len(kept),
        address("result", result, torch.float64),
        threads(),
    )
    return result
