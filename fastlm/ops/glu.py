"""Gated linear units: swiglu and geglu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm.kernels import _platform
from fastlm.ops._check import check_choice, check_device, check_floating
from fastlm.ops._library import define, distinct, no_double_backward

OP = Op(
    "glu",
    Backend("cpu", "fastlm.native.glu", frozenset({"cpu"}), LOW_PRECISION, missing=native.missing),
    Backend("triton", "fastlm.kernels.glu", _platform.DEVICES, LOW_PRECISION, missing=_platform.missing),
    Backend("cuda", "fastlm.cuda.glu", cuda.DEVICES, LOW_PRECISION, missing=cuda.missing, unverified=True),
    Backend("reference", "fastlm.reference.glu"),
)


def _fake_forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape)


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


_forward = define(OP, "forward", "(Tensor gate, Tensor? up, str activation, str backend) -> Tensor", _fake_forward)
_backward = define(
    OP,
    "backward",
    "(Tensor dy, Tensor gate, Tensor? up, str activation, str backend) -> (Tensor, Tensor)",
    _fake_backward,
)


class _Glu(torch.autograd.Function):
    """Saves gate and up; the activation is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return _forward(gate, up, activation, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = _backward(dy, gate, up, ctx.activation, ctx.backend)
        return dgate, None if up is None else dup, None, None


def _glu(gate: Tensor, up: Tensor | None, activation: str, backend: str | None) -> Tensor:
    check_floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got a scalar")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate holds [gate | up] when up is None, so its last dimension must be even, got {tuple(gate.shape)}"
            )
    else:
        check_floating("up", up)
        check_device("up", up, gate, "gate")
        if up.shape != gate.shape or up.dtype != gate.dtype:
            raise ValueError(
                f"up must be {tuple(gate.shape)} of {gate.dtype} like gate, got {tuple(up.shape)} of {up.dtype}"
            )
    name = OP.select(gate, backend)
    if torch.is_grad_enabled():
        return _Glu.apply(*distinct(gate, up), activation, name)
    return _forward(gate, up, activation, name)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate: (..., N), or (..., 2N) holding [gate | up] when up is None; float32, bfloat16, float16 or float64. Any
            strides; no copy is made of rows with a contiguous last dimension, so the halves of one product are fine.
        up: (..., N), like gate.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        (..., N), dtype of gate, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or a packed gate has an odd last dimension.
        TypeError: an argument is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: gate and up. The packed form gets its gradient as one tensor. No double backward.
    """
    return _glu(gate, up, "silu", backend)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """y = gelu(gate) * up (Shazeer 2020, arXiv:2002.05202).

    Args:
        approximate: "none" (erf) or "tanh", as in gelu. The rest, and everything else, as in swiglu.
    """
    check_choice("approximate", approximate, "none", "tanh")
    return _glu(gate, up, "gelu" if approximate == "none" else "gelu_tanh", backend)
