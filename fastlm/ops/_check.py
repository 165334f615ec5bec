"""Checks of arguments shared by several ops. Each message names the argument, what came and what is allowed."""

from __future__ import annotations

from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def check_choice(name: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """x (..., N), residual like x, weight and bias (N,)."""
    check_floating("x", x)
    shape, device = x.shape, x.device  # read once: torch makes a new object for each asking
    if not shape:
        raise ValueError("x must have at least one dimension, got a scalar")
    if residual is not None:
        check_floating("residual", residual)
        if residual.device != device:
            check_device("residual", residual, x, "x")
        if residual.shape != shape or residual.dtype != x.dtype:
            came = f"{tuple(residual.shape)} of {residual.dtype}"
            raise ValueError(f"residual must be {tuple(shape)} of {x.dtype} like x, got {came}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_floating(name, parameter)
            if parameter.device != device:
                check_device(name, parameter, x, "x")
            if parameter.shape != shape[-1:]:
                raise ValueError(
                    f"{name} must be ({shape[-1]},) like the last dimension of x, got {tuple(parameter.shape)}"
                )
