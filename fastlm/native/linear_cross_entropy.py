"""forward() and backward() of linear_cross_entropy: matrix products from torch, the loss of each part of the logits by
the cross_entropy kernels, which write the gradient over them.

float32 walks the rows: a chunk of logits, its gradients, three products in all. A fourth would cost a third more.
The half types walk the classes, twice: a slice of every row's logits for the statistics, then, in the backward, the
same slice again for the gradient. The fourth product (66 ms of 2048 rows, 768 channels, 50304 classes) costs less than
what it saves: the weight's gradient is one product over all rows, whole and rounded once, where chunks of rows would
read and write its float32 sum again and again (96 ms), and nothing is larger than a slice. The kernel writes a slice's
gradient a second time, transposed, because torch's half product with a transposed left side runs at half the speed.

Memory beside the results: one chunk of logits; or a slice of logits, its transposed gradient, its classes' weight and
weight gradient where the dtypes differ, and the float32 sum of hidden's gradient.

implementation and gradient_filter are "chunked" and None: the op's table says that nothing else comes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_double

import torch
from torch import Tensor

from fastlm.native import Loan, empty, float32, nothing, workspace
from fastlm.native.cross_entropy import (
    backward_rows,
    check_labels,
    forward_rows,
    read_slice,
    reciprocal,
    reduced,
    room,
)

CHUNK_ELEMENTS = 36 << 20
"""float32 logits at a time: fewer make the products slower (336 rows of 50304 by a tenth), more only take memory."""
SLICE_ELEMENTS = 1 << 23
"""Half logits at a time, unless they are too many rows for"""
LEAST_CLASSES = 2048
"""at a time: each slice costs a pass over the float32 sum of hidden's gradient."""


def chunks(M: int, V: int) -> Iterator[slice]:
    """Slices of the rows, as even as multiples of 16 allow."""
    count = max(1, -(-M // max(16, CHUNK_ELEMENTS // V)))
    rows = -(-M // (16 * count)) * 16
    for begin in range(0, M, max(rows, 1)):
        yield slice(begin, min(begin + rows, M))


def slices(M: int, V: int) -> list[slice]:
    """Slices of the classes, as even as multiples of 64 allow."""
    count = -(-V // max(LEAST_CLASSES, SLICE_ELEMENTS // max(M, 1)))
    classes = -(-V // (64 * count)) * 64
    return [slice(begin, min(begin + classes, V)) for begin in range(0, V, classes)]


def two_passes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the gradients are made from the logits made anew, so that the forward has no reason to make them."""
    return hidden.dtype.itemsize == 2 and weight.shape[0] > max(
        LEAST_CLASSES, SLICE_ELEMENTS // max(hidden.shape[0], 1)
    )


_Options = tuple[int, float, float, float | None]  # ignore_index, label_smoothing, z_loss, softcap


class _Head:
    """The head's products on a chunk of rows, and the sums of its gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        (m, c), v = hidden.shape, weight.shape[0]
        self.chunks = list(chunks(m, v))
        self.dhidden = empty((m, c) if needs[0] else (0,), hidden.dtype)
        self.dweight = empty((v, c) if needs[1] else (0,), torch.float32)
        self.dbias = empty((v,) if needs[2] else (0,), torch.float32)
        self.needs = needs
        if m == 0:
            self.dweight.zero_()
            self.dbias.zero_()

    def room(self) -> Loan:
        """For a chunk's logits."""
        rows = self.chunks[0].stop if self.chunks else 0
        return workspace(rows * self.weight.shape[0], self.hidden.dtype)

    def logits(self, rows: slice, room: Tensor) -> Tensor:
        """The logits of these rows, which lie in the room."""
        m, v = rows.stop - rows.start, self.weight.shape[0]
        return _logits(self.hidden[rows], self.weight, self.bias, room[: m * v].view(m, v))

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Takes a chunk's share of the gradients. The first chunk stores, so that nothing needs to be zeroed."""
        hidden, first = self.hidden[rows], rows.start == 0
        if self.needs[0]:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.needs[1]:
            if hidden.dtype is not torch.float32:  # a single chunk, or two_passes() would hold
                self.dweight.copy_(dlogits.t() @ hidden)
            elif first:
                torch.mm(dlogits.t(), hidden, out=self.dweight)
            else:
                self.dweight.addmm_(dlogits.t(), hidden)
        if self.needs[2]:
            total = dlogits.sum(0, dtype=torch.float32)
            if first:
                self.dbias.copy_(total)
            else:
                self.dbias.add_(total)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class _Slices:
    """The head's products on a slice of the classes."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.slices = slices(hidden.shape[0], weight.shape[0])

    def room(self, count: int = 1) -> Loan:
        """For this many matrices of a slice's logits."""
        return workspace(count * self.hidden.shape[0] * self.slices[0].stop, self.hidden.dtype)

    def logits(self, classes: slice, room: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of these classes, which lie in the room, and their weight in the dtype of the products."""
        dtype, m, v = self.hidden.dtype, self.hidden.shape[0], classes.stop - classes.start
        weight = self.weight[classes].to(dtype)
        bias = None if self.bias is None else self.bias[classes].to(dtype)
        return _logits(self.hidden, weight, bias, room[: m * v].view(m, v)), weight


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, w: Tensor | None, options: _Options
) -> tuple[Tensor, c_double, Tensor]:
    """Rows' losses, their sum, stats, from one walk over the classes."""
    m, v = hidden.shape[0], weight.shape[0]
    loss, stats = empty((m,), torch.float32), empty((3, m), torch.float32)
    loss_sum, state = c_double(), empty((m, 5), torch.float64)
    head = _Slices(hidden, weight, bias)
    with head.room() as room:
        for classes in head.slices:
            logits, _ = head.logits(classes, room)
            read_slice(logits, target, w, *options, state, loss, loss_sum, stats, classes.start, v)
    return loss, loss_sum, stats


def _gradients(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    w: Tensor | None,
    options: _Options,
    scale: float,
    stats: Tensor,
    needs: list[bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from a second walk over the classes; those of weight and bias in these dtypes."""
    (m, c), v, dtype = hidden.shape, weight.shape[0], hidden.dtype
    head = _Slices(hidden, weight, bias)
    total = empty((m, c) if needs[0] else (0,), torch.float32)
    dweight = empty((v, c) if needs[1] else (0,), dtypes[0])
    dbias = empty((v,) if needs[2] else (0,), dtypes[1])
    with head.room() as room, head.room(int(needs[1])) as turned:
        for classes in head.slices:
            logits, part = head.logits(classes, room)
            transposed = turned[: logits.numel()].view(logits.shape[1], m) if needs[1] else None
            backward_rows(dy, logits, target, w, *options, scale, stats, logits, transposed, classes.start, v)
            if needs[2]:
                dbias[classes] = logits.sum(0, dtype=torch.float32)
            if needs[0]:
                rows, own = _take_targets(logits, part, target, classes)
                share = logits @ part
                if classes.start == 0:
                    total.copy_(share)
                else:
                    total.add_(share)
                total[rows] += own
            if transposed is not None:
                if dweight.dtype is dtype:
                    torch.mm(transposed, hidden, out=dweight[classes])
                else:
                    dweight[classes] = transposed @ hidden
    return total.to(dtype), dweight, dbias


def _take_targets(dlogits: Tensor, weight: Tensor, target: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target is among these classes and what it gives their gradient, (rows, C) float32; dlogits are
    zero there afterwards.

    It is by far the largest part. Were it rounded with a slice's product, the small parts of other slices would not
    move the sum by half a unit of the half type, and the final rounding would lose them, the same way in every row.
    """
    rows = ((target >= classes.start) & (target < classes.stop)).nonzero().squeeze(1)
    places = target[rows] - classes.start
    own = dlogits[rows, places].float().unsqueeze(1) * weight[places]
    dlogits[rows, places] = 0.0
    return rows, own


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
    target, w = target.contiguous(), float32(class_weight)
    total = check_labels(target, w, ignore_index, v)
    options, scale = (ignore_index, label_smoothing, z_loss, softcap), reciprocal(total, reduction)
    with torch.autocast("cpu", enabled=False):
        if two_passes(hidden, weight):
            inputs = (hidden, weight, bias, target, w, options)
            loss, loss_sum, stats = _statistics(*inputs)
            if any(needs):
                gradients = _gradients(torch.ones(()), *inputs, scale, stats, needs, (torch.float32,) * 2)
            else:
                gradients = nothing(hidden.dtype), nothing(torch.float32), nothing(torch.float32)
            return reduced(loss, loss_sum, total, reduction), stats, *gradients
        loss, stats = empty((m,), torch.float32), empty((3, m), torch.float32)
        loss_sum = c_double()
        head, scratch = _Head(hidden, weight, bias, needs), room(v)
        with head.room() as chunk:
            for rows in head.chunks:
                logits = head.logits(rows, chunk)
                dlogits = logits if any(needs) else None
                forward_rows(
                    logits, target[rows], w, *options, scale, loss[rows], loss_sum, stats[:, rows], dlogits, scratch
                )  # fmt: skip
                if dlogits is not None:
                    head.add(rows, dlogits)
    return reduced(loss, loss_sum, total, reduction), stats, head.dhidden, head.dweight, head.dbias


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
    target, w = target.contiguous(), float32(class_weight)
    scale = reciprocal(check_labels(target, w, ignore_index, v), reduction)
    options, dy = (ignore_index, label_smoothing, z_loss, softcap), dy.to(torch.float32)
    dtypes = weight.dtype, torch.float32 if bias is None else bias.dtype
    with torch.autocast("cpu", enabled=False):
        if two_passes(hidden, weight):
            inputs = (hidden, weight, bias, target, w, options)
            return _gradients(dy, *inputs, scale, stats, needs, dtypes)
        head, dy = _Head(hidden, weight, bias, needs), dy.expand(m)
        with head.room() as chunk:
            for rows in head.chunks:
                logits = head.logits(rows, chunk)
                backward_rows(dy[rows], logits, target[rows], w, *options, scale, stats[:, rows], logits)
                head.add(rows, logits)
    return head.dhidden, head.dweight.to(dtypes[0]), head.dbias.to(dtypes[1])
