"""Tensors in the order their memory lies in: for kernels that take addresses, sizes and strides alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """(..., N) as (M, N) with a contiguous last dimension: a view where strides allow, else a copy."""
    n = tensor.shape[-1]
    flat = tensor.reshape(-1, n) if tensor.numel() else tensor.reshape(tensor.shape[:-1].numel(), n)
    return flat if flat.stride(1) == 1 or n <= 1 else flat.contiguous()


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
