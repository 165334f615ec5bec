"""gelu, exact and in the tanh form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_choice, check_floating
from fastlm.ops._library import define, no_double_backward

OP = Op(
    "gelu",
    Backend("cpu", "fastlm.native.gelu", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.gelu", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.gelu", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.gelu"),
)


def _fake_forward(x: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


_forward = define(OP, "forward", "(Tensor x, bool tanh, str backend) -> Tensor", _fake_forward)
_backward = define(OP, "backward", "(Tensor dy, Tensor x, bool tanh, str backend) -> Tensor", _fake_backward)


class _Gelu(torch.autograd.Function):
    """Saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, backend: str) -> Any:
        ctx.save_for_backward(x)
        ctx.tanh, ctx.backend = tanh, backend
        return _forward(x, tanh, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _backward(dy, *ctx.saved_tensors, ctx.tanh, ctx.backend), None, None


def gelu(x: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """The Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    y = x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2; with approximate="tanh"
    y = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2.

    Args:
        x: any shape, float32, bfloat16, float16 or float64; a copy is made unless it is contiguous.
        approximate: "none" or "tanh", as torch.nn.functional.gelu.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: unknown approximate.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: x. No double backward.
    """
    check_floating("x", x)
    check_choice("approximate", approximate, "none", "tanh")
    name = OP.select(x, backend)
    if torch.is_grad_enabled():
        return _Gelu.apply(x, approximate == "tanh", name)
    return _forward(x, approximate == "tanh", name)
