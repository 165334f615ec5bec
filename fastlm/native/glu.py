"""forward() and backward() of glu (swiglu, geglu) over the C++ extension."""

from __future__ import annotations

from torch import Tensor

from fastlm.native import ACTIVATIONS, DTYPES, address, empty, extension, rows, threads


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    dtype = gate.dtype
    n = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    y = empty((*gate.shape[:-1], n), dtype)
    a = rows(gate)
    b = a[:, n:] if up is None else rows(up)
    extension().glu_forward(
        DTYPES[dtype], ACTIVATIONS[activation],
        address("gate", a, dtype, contiguous=False), a.stride(0),
        address("up", b, dtype, contiguous=False), b.stride(0),
        address("y", y, dtype), a.shape[0], n, threads(),
    )  # fmt: skip
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dtype = gate.dtype
    a, g, n = rows(gate), rows(dy), dy.shape[-1]
    b = a[:, n:] if up is None else rows(up)
    dgate = empty(gate.shape, dtype)
    dup = empty((0,) if up is None else up.shape, dtype)
    start = address("dgate", dgate, dtype)
    extension().glu_backward(
        DTYPES[dtype], ACTIVATIONS[activation],
        address("dy", g, dtype, contiguous=False), g.stride(0),
        address("gate", a, dtype, contiguous=False), a.stride(0),
        address("up", b, dtype, contiguous=False), b.stride(0),
        start, start + n * dtype.itemsize if up is None else address("dup", dup, dtype), gate.shape[-1],
        a.shape[0], n, threads(),
    )  # fmt: skip
    return dgate, dup
