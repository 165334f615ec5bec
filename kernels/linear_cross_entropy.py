"""linear_cross_entropy in Triton, in two forms.

chunked: logits of a chunk of rows by cuBLAS, loss and gradient over them by the cross_entropy kernel, dhidden and the
chunk's share of dweight by cuBLAS again: three products in all, made in the forward. The weight's gradient is summed
over the chunks in float32, by products that come out in float32.

Size of a chunk: it costs a pass over the float32 sum, 8 V C bytes, beside a product of 2 rows V C operations; at
4.8 TB/s and 700 TFLOP/s that is 580 / rows of the product's time. CHUNK_BYTES allow 5336 rows of 50304 logits in
bfloat16 (4 % of the three products) and 2092 of 128256 (9 %). Traffic of logits: written by the product, read and
written by cross_entropy, read by two products. Rows lie a multiple of 128 bytes apart, whatever V is, which cuBLAS and
cross_entropy like best.

fused: _linear_cross_entropy_fused.py. Five products, but no logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.kernels import _linear_cross_entropy_fused as fused
from fastlm.kernels._launch import cdiv, empty
from fastlm.kernels._scale import scale as scale
from fastlm.kernels.cross_entropy import backward_rows, forward_rows, options, reduced, row_weights

CHUNK_BYTES = 512 << 20
ROW_STEP = 128
"""Rows of a chunk are a multiple of this, the height of a matrix product's tile."""


def chunks(M: int, V: int, itemsize: int) -> Iterator[slice]:
    """Slices of the rows, as even as multiples of ROW_STEP allow."""
    count = max(1, cdiv(M, max(ROW_STEP, CHUNK_BYTES // (itemsize * V))))
    rows = max(cdiv(M, ROW_STEP * count) * ROW_STEP, 1)
    for begin in range(0, M, rows):
        yield slice(begin, min(begin + rows, M))


class _Head:
    """The head's products on a chunk of rows, and the sums of its gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        (m, c), v = hidden.shape, weight.shape[0]
        self.chunks = list(chunks(m, v, hidden.itemsize))
        step = 128 // hidden.itemsize
        padded = empty((self.chunks[0].stop if m else 0, cdiv(v, step) * step), hidden)
        padded[:, v:].zero_()  # torch's CPU products, which the interpreter meets, multiply what lies there by 0
        self.buffer = padded[:, :v]
        self.dhidden = empty((m, c) if needs[0] else (0,), hidden)
        self.dweight = empty((v, c) if needs[1] else (0,), hidden, torch.float32)
        self.dbias = empty((v,) if needs[2] else (0,), hidden, torch.float32)
        self.needs = needs
        if m == 0:
            self.dweight.zero_()
            self.dbias.zero_()

    def logits(self, rows: slice) -> Tensor:
        out = self.buffer[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.t(), out=out)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Takes a chunk's share of the gradients. The first chunk stores, so that nothing needs to be zeroed."""
        if self.needs[0]:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.needs[1]:
            add_product(self.dweight, dlogits.t(), self.hidden[rows], rows.start == 0)
        if self.needs[2]:
            total = dlogits.sum(0, dtype=torch.float32)
            if rows.start == 0:
                self.dbias.copy_(total)
            else:
                self.dbias.add_(total)


def add_product(into: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """into (float32) becomes, or grows by, left @ right."""
    if right.dtype is torch.float32:
        if first:
            torch.mm(left, right, out=into)
        else:
            into.addmm_(left, right)
    elif right.is_cuda and torch.version.hip is None:  # unrounded
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=into)
        else:
            torch.addmm(into, left, right, out_dtype=torch.float32, out=into)
    elif first:
        into.copy_(left @ right)
    else:
        into.add_(left @ right)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    implementation: str,
    gradient_filter: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, v = hidden.shape[0], weight.shape[0]
    option = options(class_weight, v, ignore_index, label_smoothing, z_loss, softcap)
    total = row_weights(target, option, v, reduction)
    loss, stats = empty((m,), hidden, torch.float32), empty((3, m), hidden, torch.float32)
    if implementation == "fused":
        fused.forward(hidden, weight.to(hidden.dtype), bias, target, option, loss, stats)
        loss = reduced(loss, total, reduction)
        if not any(needs):
            return loss, stats, empty((0,), hidden), empty((0,), stats), empty((0,), stats)
        one = torch.ones((), dtype=torch.float32, device=hidden.device)
        gradients = fused.backward(
            one, hidden, weight.to(hidden.dtype), bias, target, option, total, stats, gradient_filter, needs
        )
        return loss, stats, *gradients
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, needs)
        for rows in head.chunks:
            logits = head.logits(rows)
            dlogits = logits if any(needs) else None
            forward_rows(logits, target[rows], option, total, loss[rows], stats[:, rows], dlogits)
            if dlogits is not None:
                head.add(rows, dlogits)
    return reduced(loss, total, reduction), stats, head.dhidden, head.dweight, head.dbias


def backward(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    implementation: str,
    gradient_filter: float | None,
    stats: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = hidden.shape[0], weight.shape[0]
    option = options(class_weight, v, ignore_index, label_smoothing, z_loss, softcap)
    total = row_weights(target, option, v, reduction)
    if implementation == "fused":
        dhidden, dweight, dbias = fused.backward(
            dy, hidden, weight.to(hidden.dtype), bias, target, option, total, stats, gradient_filter, needs
        )
    else:
        dy = dy.expand(m)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, needs)
            for rows in head.chunks:
                logits = head.logits(rows)
                backward_rows(dy[rows], logits, target[rows], option, total, stats[:, rows], logits)
                head.add(rows, logits)
        dhidden, dweight, dbias = head.dhidden, head.dweight, head.dbias
    return dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)
