"""forward() and backward() of linear_cross_entropy: matrix products from torch, the loss of each chunk of rows from the
cross_entropy kernel, which writes the gradient over the chunk's logits.

Memory beside the results: one chunk of logits, weight cast to the products' dtype where it differs, and for the half
types one slice of the weight's gradient. A half product is rounded before it is added to the float32 sum, so the error
does not grow with the number of chunks.

implementation and gradient_filter are "chunked" and None: the op's table says that nothing else comes here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.native import empty, float32
from fastlm.native.cross_entropy import backward_rows, check_labels, forward_rows, reciprocal, reduced, room

CHUNK_ELEMENTS = 1 << 24
"""Logits at a time: fewer make the products slower (128 rows of 50304 by a quarter), more only take memory."""
SLICE_ELEMENTS = 1 << 22
"""Elements of the weight's gradient at a time, where a half product goes to a float32 sum."""


def chunks(M: int, V: int, half: bool = False) -> Iterator[slice]:
    """Slices of the rows, as even as multiples of 16 allow.

    Half as many again for the half types: each chunk costs them a pass over the float32 sum, a tenth of its time.
    """
    elements = CHUNK_ELEMENTS * 3 // 2 if half else CHUNK_ELEMENTS
    count = max(1, -(-M // max(16, elements // V)))
    rows = -(-M // (16 * count)) * 16
    for begin in range(0, M, max(rows, 1)):
        yield slice(begin, min(begin + rows, M))


class _Head:
    """The head's products on a chunk of rows, and the sums of its gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        (m, c), v = hidden.shape, weight.shape[0]
        self.chunks = list(chunks(m, v, half=hidden.itemsize == 2))
        self.buffer = empty((self.chunks[0].stop if m else 0, v), hidden.dtype)
        self.dhidden = empty((m, c) if needs[0] else (0,), hidden.dtype)
        self.dweight = empty((v, c) if needs[1] else (0,), torch.float32)
        self.dbias = empty((v,) if needs[2] else (0,), torch.float32)
        self.needs = needs
        self.slice = max(1, SLICE_ELEMENTS // max(c, 1))
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
            self._add_weight(dlogits.t(), self.hidden[rows], rows.start == 0)
        if self.needs[2]:
            total = dlogits.sum(0, dtype=torch.float32)
            if rows.start == 0:
                self.dbias.copy_(total)
            else:
                self.dbias.add_(total)

    def _add_weight(self, left: Tensor, right: Tensor, first: bool) -> None:
        if right.dtype is torch.float32:
            if first:
                torch.mm(left, right, out=self.dweight)
            else:
                self.dweight.addmm_(left, right)
            return
        for begin in range(0, left.shape[0], self.slice):
            part, share = self.dweight[begin : begin + self.slice], left[begin : begin + self.slice] @ right
            if first:
                part.copy_(share)
            else:
                part.add_(share)


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
    loss, loss_sum, stats = (
        empty((m,), torch.float32),
        torch.zeros(1, dtype=torch.float64),
        empty((3, m), torch.float32),
    )
    options = (w, ignore_index, label_smoothing, z_loss, softcap, reciprocal(total, reduction))
    with torch.autocast("cpu", enabled=False):
        head, scratch = _Head(hidden, weight, bias, needs), room(v)
        for rows in head.chunks:
            logits = head.logits(rows)
            dlogits = logits if any(needs) else None
            forward_rows(
                logits, target[rows], *options, loss[rows], loss_sum, stats[:, rows], dlogits, scratch
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
    dy = dy.to(torch.float32).expand(m)
    with torch.autocast("cpu", enabled=False):
        head = _Head(hidden, weight, bias, needs)
        for rows in head.chunks:
            logits = head.logits(rows)
            backward_rows(
                dy[rows], logits, target[rows], w, ignore_index, label_smoothing, z_loss, softcap, scale,
                stats[:, rows], logits,
            )  # fmt: skip
            head.add(rows, logits)
    return head.dhidden, head.dweight, head.dbias
