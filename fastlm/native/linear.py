"""forward() and backward() of linear: torch's products, but for the gradients of weight and bias in the half types.

Both operands of that product have their long dimension outside, where torch's runs at half the rate of the others; the
kernel is 1.1 to 2 times as fast, keeps float32 sums in float32 and takes dbias from the same pass. For a weight that
is the transpose of a (K, N) parameter it makes x^T dy, so that the gradient lies as the parameter does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._walk import across, outer, rows
from fastlm.native import DTYPES, address, empty, extension, nothing, output, threads, workspace

F32 = torch.float32


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wide: bool, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype
    dy, flat = rows(dy), rows(x)
    dx = torch.mm(dy, weight).view(x.shape) if needs_x else nothing(dtype)
    if needs_weight and dtype is not F32 and dy.numel() and flat.numel():
        if across(weight):
            dweight = _weight_gradient(flat, dy, F32 if wide else dtype, False)[0].t()
            dbias = (dy.sum(0, dtype=F32) if wide else dy.sum(0).to(F32)) if needs_bias else nothing(F32)
        else:
            dweight, dbias = _weight_gradient(dy, flat, F32 if wide else dtype, needs_bias)
    else:
        dweight = outer(dy, flat, weight) if needs_weight else nothing(dtype)
        dweight = dweight.to(F32) if wide else dweight
        dbias = dy.sum(0, dtype=F32) if needs_bias else nothing(F32)
    return dx, dweight, dbias


def _weight_gradient(dy: Tensor, x: Tensor, out: torch.dtype, needs_bias: bool) -> tuple[Tensor, Tensor]:
    dtype, (m, n), k = x.dtype, dy.shape, x.shape[1]
    dweight = empty((n, k), out)
    dbias = empty((n,), F32) if needs_bias else nothing(F32)
    with workspace(threads() * extension().linear_room(n, k) + 64, torch.uint8) as scratch:
        extension().linear_weight_gradient(
            DTYPES[dtype], address("dy", dy, dtype, contiguous=False), dy.stride(0),
            address("x", x, dtype, contiguous=False), x.stride(0), DTYPES[out], output(dweight),
            output(dbias) if needs_bias else 0, output(scratch), m, n, k, threads(),
        )  # fmt: skip
    return dweight, dbias
