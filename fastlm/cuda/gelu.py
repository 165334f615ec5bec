"""forward() and backward() of gelu over the CUDA launchers."""

from __future__ import annotations

from torch import Tensor

from fastlm.cuda import ACTIVATIONS, DTYPES, address, empty, extension, lane, output


def forward(x: Tensor, tanh: bool) -> Tensor:
    dtype, x = x.dtype, x.contiguous()
    y = empty(x.shape, x)
    extension().gelu_forward(
        DTYPES[dtype], ACTIVATIONS["gelu_tanh" if tanh else "gelu"],
        address("x", x, dtype), output(y), x.numel(), *lane(x),
    )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    dtype, x, dy = x.dtype, x.contiguous(), dy.contiguous()
    dx = empty(x.shape, x)
    extension().gelu_backward(
        DTYPES[dtype], ACTIVATIONS["gelu_tanh" if tanh else "gelu"],
        address("dy", dy, dtype), address("x", x, dtype), output(dx), x.numel(), *lane(x),
    )  # fmt: skip
    return dx
