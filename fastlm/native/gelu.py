"""forward() and backward() of gelu over the C++ extension."""

from __future__ import annotations

from torch import Tensor

from fastlm.native import ACTIVATIONS, DTYPES, address, empty, extension, output, threads


def forward(x: Tensor, tanh: bool) -> Tensor:
    dtype, x = x.dtype, x.contiguous()
    y = empty(x.shape, dtype)
    extension().gelu_forward(
        DTYPES[dtype], ACTIVATIONS["gelu_tanh" if tanh else "gelu"],
        address("x", x, dtype), output(y), x.numel(), threads(),
    )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    dtype, x, dy = x.dtype, x.contiguous(), dy.contiguous()
    dx = empty(x.shape, dtype)
    extension().gelu_backward(
        DTYPES[dtype], ACTIVATIONS["gelu_tanh" if tanh else "gelu"],
        address("dy", dy, dtype), address("x", x, dtype), output(dx), x.numel(), threads(),
    )  # fmt: skip
    return dx
