"""forward() and backward() of glu (swiglu, geglu) over the CUDA launchers."""

from __future__ import annotations

from torch import Tensor

from fastlm.cuda import ACTIVATIONS, DTYPES, empty, extension, lane, matrix, nothing, output


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    dtype, shape = gate.dtype, gate.shape
    n = shape[-1] // 2 if up is None else shape[-1]
    m = gate.numel() // shape[-1] if n else 0
    a, a_address, a_stride = matrix("gate", gate, dtype)
    _b, b_address, b_stride = (a, a_address + n * dtype.itemsize, a_stride) if up is None else matrix("up", up, dtype)
    y = empty((*shape[:-1], n) if up is None else shape, gate)
    extension().glu_forward(
        DTYPES[dtype], ACTIVATIONS[activation], a_address, a_stride, b_address, b_stride, output(y), m, n, *lane(y)
    )
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dtype, shape, n = gate.dtype, gate.shape, dy.shape[-1]
    m = dy.numel() // n if n else 0
    _g, g_address, g_stride = matrix("dy", dy, dtype)
    a, a_address, a_stride = matrix("gate", gate, dtype)
    _b, b_address, b_stride = (a, a_address + n * dtype.itemsize, a_stride) if up is None else matrix("up", up, dtype)
    dgate = empty(shape, gate)
    dup = nothing(gate) if up is None else empty(shape, gate)
    start = output(dgate)
    extension().glu_backward(
        DTYPES[dtype], ACTIVATIONS[activation], g_address, g_stride, a_address, a_stride, b_address, b_stride,
        start, start + n * dtype.itemsize if up is None else output(dup), shape[-1], m, n, *lane(dgate),
    )  # fmt: skip
    return dgate, dup
