"""Tensors in the order their memory lies in: for kernels that take addresses, sizes and strides alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """(..., N) as (M, N) with a contiguous last dimension: a view where strides allow, else a copy."""
    n = tensor.shape[-1]
    flat = tensor.reshape(-1, n) if tensor.numel() else tensor.reshape(tensor.shape[:-1].numel(), n)
    return flat if flat.stride(1) == 1 or n <= 1 else flat.contiguous()


def across(matrix: Tensor) -> bool:
    """Whether it is the transpose of a matrix that lies row by row."""
    return matrix.stride(0) == 1 < matrix.stride(1)


def outer(dy: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """dy^T x, lying as `like` does: (M, N) and (M, K) give (N, K)."""
    return torch.mm(x.t(), dy).t() if across(like) else torch.mm(dy.t(), x)


def dense(tensor: Tensor) -> bool:
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


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Strides of what is walked as the tensor lies: its own if it is dense, else contiguous ones."""
    return tensor.stride() if dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


class Walk:
    """Parameters, and what else is walked along them element by element.

    All tensors of a parameter are walked in the parameter's own order: as it lies when it is dense, contiguously when
    it has gaps. Where a tensor lies differently, a copy of it is walked: begin() fills the copies, end() writes them
    back.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [p.numel() for p in params]
        self._orders = [memory_order(p) for p in params]
        self.strides = [None if p.is_contiguous() or not dense(p) else p.stride() for p in params]
        """Of the order walked; None where that is contiguous."""
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._watched: list[Tensor] = []
        self._seen: list[object] = []

    def along(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is walked in place of tensors, one for each parameter (or none at all)."""
        return [self._follow(t, order) for t, order in zip(tensors, self._orders, strict=bool(tensors))]

    def _follow(self, tensor: Tensor, order: tuple[int, ...]) -> Tensor:
        if tensor.stride() == order:
            return tensor
        copy = torch.empty_strided(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
        self.copies.append((tensor, copy))
        return copy

    def gradient(self, grad: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        """The gradient of a parameter in this dtype and in the order walked; itself where it is so already."""
        if grad.numel() != self.sizes[index]:
            raise ValueError(f"grad must have {self.sizes[index]} elements like its parameter, got {tuple(grad.shape)}")
        strides = self.strides[index]
        if strides is None:
            return grad.to(dtype).contiguous()
        if grad.dtype is dtype and grad.stride() == strides:
            return grad
        return torch.empty_strided(grad.shape, strides, dtype=dtype, device=grad.device).copy_(grad)

    def begin(self) -> None:
        for tensor, copy in self.copies:
            copy.copy_(tensor)

    def end(self) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)
        # The kernel wrote behind autograd's back: a later backward() through the old values must notice.
        torch.autograd.graph.increment_version(self.params)

    def watch(self, *lists: Sequence[Tensor]) -> None:
        """Remembers where the parameters and these tensors lie."""
        self._watched = [*self.params, *(t for tensors in lists for t in tensors)]
        self._seen = self._look()

    def _look(self) -> list[object]:
        return [
            *[t.data_ptr() for t in self._watched],
            *[p.stride() for p in self.params],
            *[p.dtype for p in self.params],
        ]

    def current(self) -> bool:
        """Whether every tensor still lies where it lay (`p.data = ...` and `module.to()` move them)."""
        return self._look() == self._seen


# --- the tensors of a step of Adam: what its kernels take, on every backend ------------------------------------------

ROWS = ("size", "step", "param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "seed", "exp_avg_absmax",
        "exp_avg_sq_absmax", "shadow_param")  # fmt: skip
"""Of a table, a column for each tensor: elements, addresses (0: there is none), and the seed of stochastic rounding."""
ELEMENTWISE = frozenset({"param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "shadow_param"})
F32 = torch.float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Check = Callable[..., object]
"""check(name, tensor, *dtypes): raises unless it is a real strided tensor of the backend and of one of the dtypes."""


class Tensors:
    """The tensors of one call in the order the kernels walk them, and their addresses.

    With fifty tensors the Python around a step costs as much as the step, so addresses are taken and checked here,
    once, and kept for as long as current() finds them unchanged. Gradients are new tensors at each step: those are
    looked at each time.
    """

    def __init__(
        self,
        check: Check,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        master_params: Sequence[Tensor],
        seeds: Sequence[int],
        exp_avg_absmaxes: Sequence[Tensor],
        exp_avg_sq_absmaxes: Sequence[Tensor],
        shadow_params: Sequence[Tensor] = (),
    ) -> None:
        self.check = check
        self.dtype, self.device = params[0].dtype, params[0].device
        self.index = params[0].get_device()
        self.count = len(params)
        self.amsgrad, self.masters, self.stochastic = bool(max_exp_avg_sqs), bool(master_params), bool(seeds)
        self.bits = 8 if exp_avg_absmaxes else 32
        self.moment_dtype = exp_avgs[0].dtype  # float32, bfloat16, or uint8: codes
        self.shadow_dtype = shadow_params[0].dtype if shadow_params else F32
        self.walk = Walk(params)
        state = self.moment_dtype
        lists = {
            "step": (steps, F32), "param": (params, self.dtype), "exp_avg": (exp_avgs, state),
            "exp_avg_sq": (exp_avg_sqs, state), "max_exp_avg_sq": (max_exp_avg_sqs, F32),
            "master_param": (master_params, F32), "exp_avg_absmax": (exp_avg_absmaxes, F32),
            "exp_avg_sq_absmax": (exp_avg_sq_absmaxes, F32),
            "shadow_param": (shadow_params, self.shadow_dtype),
        }  # fmt: skip
        self.rows: dict[str, list[int]] = {"size": self.walk.sizes, "seed": list(seeds) or [0] * self.count}
        for name, (tensors, dtype) in lists.items():
            for tensor in tensors:
                check(name, tensor, dtype)
                if tensor.device != self.device:
                    raise TypeError(f"{name} must be on {self.device} like the parameters, got {tensor.device}")
                if name not in ELEMENTWISE and not tensor.is_contiguous():
                    raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
            walked = self.walk.along(tensors) if name in ELEMENTWISE else tensors
            self.rows[name] = [t.data_ptr() for t in walked] or [0] * self.count
        self.walk.watch(*(tensors for tensors, _ in lists.values() if tensors is not params))

    def current(self) -> bool:
        """Whether the tensors still lie where they lay."""
        return self.walk.current()

    def table(self) -> array[int]:
        """The rows one behind the other, for a kernel that reads the host's memory."""
        return array("q", [value for name in ROWS for value in self.rows[name]])

    def gradients(self, grads: Sequence[Tensor]) -> tuple[list[Tensor], torch.dtype]:
        """The gradients as a kernel reads them: real, in the order of the parameters, all of one dtype (that of the
        parameters, or float32)."""
        dtype = grads[0].dtype if grads[0].dtype in (self.dtype, F32) else F32
        return [self._gradient(grad, dtype, i) for i, grad in enumerate(grads)], dtype

    def _gradient(self, grad: Tensor, dtype: torch.dtype, i: int) -> Tensor:
        walk = self.walk
        if walk.strides[i] is None and plain(grad, dtype, self.index) and grad.numel() == walk.sizes[i]:
            return grad
        if grad.is_neg():
            grad = grad.resolve_neg()
        self.check("grad", grad, *FLOATS)
        if grad.get_device() != self.index:
            raise TypeError(f"grad must be on {self.device} like its parameter, got {grad.device}")
        return walk.gradient(grad, dtype, i)


def plain(grad: Tensor, dtype: torch.dtype, index: int) -> bool:
    """Whether a kernel can read it as it is: true of almost every gradient, found in a third of the time of a check."""
    return (
        type(grad) is Tensor and grad.dtype is dtype and grad.get_device() == index
        and grad.layout is torch.strided and grad.is_contiguous() and not grad.is_neg()
    )  # fmt: skip


def filled(grads: Sequence[Tensor], check: Check) -> list[Tensor]:
    """Gradients of one dtype and device whose elements each fill one stretch of memory: what a norm reads."""
    dtype, index, kept = grads[0].dtype, grads[0].get_device(), []
    for grad in grads:
        if not plain(grad, dtype, index):
            if grad.is_neg() or not dense(grad):
                grad = grad.resolve_neg().contiguous()
            check("grad", grad, dtype)
        kept.append(grad)
    return kept


def address_of(values: array[int]) -> int:
    """Where the numbers lie, for as long as the array lives."""
    return values.buffer_info()[0]
