"""Mends Triton's interpreter for bfloat16; imported by _launch when TRITON_INTERPRET=1.

Triton 3.6 to 3.9 keep bfloat16 as uint16 there and compute on those integers: products, sums, comparisons and negation
are wrong, conversions from float32 truncate. Here every operation on bfloat16 widens to float32, computes, and rounds
to nearest even. Reductions (tl.sum) stay wrong: the kernels reduce in float32.

Sums in float32 go through float64: numpy adds one by one along every axis but the last, a GPU adds as a tree.

It also loses most of its time to two habits that change nothing: each call of a helper looks for what is to be
interpreted again, and each operation on 32-bit integers is done again in 64 bits for a check that is never reported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

BF16 = tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 in uint16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 in uint16, to nearest even; a NaN stays one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == BF16


def wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def rounded(data: np.ndarray) -> TensorHandle:
    return TensorHandle(narrow(data), BF16)


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == BF16:
            src = wide(src)
            return src if target == tl.float32 else original(self, src, dst_type)
        if target == BF16:
            return rounded(src.data.astype(np.float32))
        return original(self, src, dst_type)

    return cast_impl


def _convert(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if BF16 in kinds and min(kind.primitive_bitwidth for kind in kinds) > 8:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        result = original(self, wide(a), wide(b), wide(d), *rest)
        return rounded(result.data) if is_bf16(d) else result

    return create_dot


def _binary(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if not is_bf16(lhs) and not is_bf16(rhs):
            return original(self, lhs, rhs, op)
        data = op(wide(lhs).data, wide(rhs).data)
        return TensorHandle(data, tl.int1) if data.dtype == np.bool_ else rounded(data)

    return binary_op


def _unary(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def unary_op(self: Any, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        return rounded(op(widen(arg.data))) if is_bf16(arg) else original(self, arg, op)

    return unary_op


for _name, _mend in (
    ("cast_impl", _cast), ("create_fp_to_fp", _convert), ("create_dot", _dot), ("binary_op", _binary),
    ("unary_op", _unary),
):  # fmt: skip
    setattr(InterpreterBuilder, _name, _mend(getattr(InterpreterBuilder, _name)))
InterpreterBuilder.get_bf16 = lambda self, value: rounded(np.array([value], dtype=np.float32))


def _sum(self: ReduceOps, input: Any) -> Any:
    data = input.handle.data
    wide = np.float64 if data.dtype == np.float32 else None
    total = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=wide)
    return self.to_tensor(total.astype(data.dtype) if wide else total, input.dtype)


ReduceOps.sum = _sum


# --- speed -----------------------------------------------------------------------------------------------------------

_patched: set[int] = set()
"""The modules of Triton's language that are interpreted within the running kernel."""


@functools.cache
def _languages(fn: Callable[..., Any]) -> frozenset[int]:
    return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)


def _once(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch_lang(fn: Callable[..., Any]) -> Any:
        if _languages(fn) <= _patched:
            return None  # only the kernel's own is used, to put things back
        scope = original(fn)
        _patched.update(_languages(fn))
        return scope

    return patch_lang


def _afresh(original: Callable[..., None]) -> Callable[..., None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        try:
            original(self, *args, **kwargs)
        finally:
            _patched.clear()

    return call


interpreter._patch_lang = _once(interpreter._patch_lang)
GridExecutor.__call__ = _afresh(GridExecutor.__call__)
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
