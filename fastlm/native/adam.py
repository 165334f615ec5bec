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

from fastlm.native import DTYPES, address, empty, extension, threads

F32 = torch.float32


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order, each once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _pointer(values: array[int]) -> int:
    return values.buffer_info()[0]


class Prepared:
    """The tensors of one call in the memory order the kernel walks, and their addresses.

    All tensors of a parameter are walked in the parameter's own order. Where one lies differently, a copy of it is
    walked; `copies` says which, so that what was updated is written back.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        master_params: Sequence[Tensor],
        seeds: Sequence[int],
    ) -> None:
        self.params = list(params)
        self.dtype = params[0].dtype
        self.sizes = [p.numel() for p in params]
        self.stochastic = bool(seeds)
        self.copies: list[tuple[Tensor, Tensor]] = []
        for step in steps:
            address("step", step, F32)
        # What the kernel walks: dense in the parameter's order, or contiguous where the parameter has gaps.
        walked = [p if _dense(p) else p.contiguous() for p in params]
        self.strides = [None if w.is_contiguous() else w.stride() for w in walked]
        self.originals = [list(params), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs), list(master_params)]
        rows = [array("q", self.sizes), self._row("step", steps, steps, F32)]
        names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
        for name, tensors in zip(names, self.originals, strict=True):
            dtype = self.dtype if name == "param" else F32
            own = [self._walk(t, w) for t, w in zip(tensors, walked, strict=bool(tensors))]
            rows.append(self._row(name, tensors, own, dtype))
        rows.append(array("q", seeds or [0] * len(self.params)))
        self.table = array("q")
        for row in rows:
            self.table.extend(row)
        self.watched = [*self.params, *exp_avgs, *exp_avg_sqs, *steps, *max_exp_avg_sqs, *master_params]
        self.seen = self._look()

    def _walk(self, tensor: Tensor, like: Tensor) -> Tensor:
        if tensor.stride() == like.stride() and tensor.shape == like.shape:
            return tensor
        copy = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype)
        self.copies.append((tensor, copy))
        return copy

    def _row(self, name: str, tensors: Sequence[Tensor], walked: Sequence[Tensor], dtype: torch.dtype) -> array[int]:
        for tensor in tensors:
            address(name, tensor, dtype, contiguous=False)
        return array("q", [w.data_ptr() for w in walked] or [0] * len(self.params))

    def _look(self) -> list[object]:
        return [
            *[t.data_ptr() for t in self.watched],
            *[p.stride() for p in self.params],
            *[p.dtype for p in self.params],
        ]

    def current(self) -> bool:
        """Whether every tensor still lies where it lay (`p.data = ...` and `module.to()` move them)."""
        return self._look() == self.seen


def forward(
    prepared: Prepared,
    grads: Sequence[Tensor],
    lr: float,
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
    dtype = grads[0].dtype if grads[0].dtype in (prepared.dtype, F32) else F32
    kept = [_gradient(g, dtype, n, s) for g, n, s in zip(grads, prepared.sizes, prepared.strides, strict=True)]
    addresses = array("q", [g.data_ptr() for g in kept])
    scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    for tensor, copy in prepared.copies:
        copy.copy_(tensor)
    extension().adam_step(
        DTYPES[prepared.dtype], DTYPES[dtype], _pointer(prepared.table), _pointer(addresses), len(kept),
        lr, beta1, beta2, eps, weight_decay, decoupled, -scale if maximize else scale, prepared.stochastic, threads(),
    )  # fmt: skip
    for tensor, copy in prepared.copies:
        tensor.copy_(copy)
    # The kernel wrote behind autograd's back: a later backward() through the old values must notice.
    torch.autograd.graph.increment_version(prepared.params)


def _gradient(grad: Tensor, dtype: torch.dtype, size: int, strides: tuple[int, ...] | None) -> Tensor:
    """The gradient as the kernel reads it: real, of this dtype, in the parameter's memory order."""
    if (
        strides is None and type(grad) is Tensor and grad.dtype is dtype and grad.is_cpu
        and grad.layout is torch.strided and grad.is_contiguous() and not grad.is_neg() and grad.numel() == size
    ):  # fmt: skip
        return grad
    if grad.is_neg():
        grad = grad.resolve_neg()
    address("grad", grad, *DTYPES, contiguous=False)
    if grad.numel() != size:
        raise ValueError(f"grad must have {size} elements like its parameter, got {tuple(grad.shape)}")
    if strides is None:
        return grad.to(dtype).contiguous()
    if grad.dtype is dtype and grad.stride() == strides:
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=dtype).copy_(grad)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    dtype = grads[0].dtype
    kept = []
    for grad in grads:
        if grad.is_neg() or not _dense(grad):
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
