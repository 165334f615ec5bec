"""forward() and backward() of cross_entropy over the C++ extension."""

from __future__ import annotations

from ctypes import addressof, c_double, c_int64

import torch
from torch import Tensor

from fastlm._walk import rows
from fastlm.native import DTYPES, address, empty, extension, float32, threads

F32, F64, I64 = torch.float32, torch.float64, torch.int64


def check_labels(target: Tensor, weight: Tensor | None, ignore_index: int, V: int) -> float:
    """The sum of the rows' weights, weight (V,) being float32 or None.

    Raises IndexError naming the first label out of range, before any kernel has written anything.
    """
    total, wrong = c_double(), c_int64()  # a tensor of one number takes a microsecond to make and one to read
    extension().cross_entropy_labels(
        address("target", target, I64), address("weight", weight, F32), ignore_index,
        addressof(total), addressof(wrong), target.numel(), V, threads(),
    )  # fmt: skip
    if wrong.value >= 0:
        raise IndexError(f"Target {int(target[wrong.value])} is out of bounds.")
    return total.value


def reciprocal(total: float, reduction: str) -> float:
    """What a row's loss is multiplied by; infinite where a mean has nothing to average."""
    return 1.0 if reduction != "mean" else 1.0 / total if total else float("inf")


def reduced(loss: Tensor, loss_sum: c_double, total: float, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    value = loss_sum.value
    if reduction == "mean":
        value = value / total if total else float("nan") if value == 0.0 else value * float("inf")
    return empty((), F32).fill_(value)


def forward_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    loss: Tensor,
    loss_sum: c_double,
    stats: Tensor,
    dlogits: Tensor | None,
    scratch: Tensor,
) -> None:
    """The kernel on rows whose labels were checked: fills loss (M,), stats (3, M) and dlogits, adds to loss_sum."""
    dtype, (m, v) = logits.dtype, logits.shape
    extension().cross_entropy_forward(
        DTYPES[dtype], address("logits", logits, dtype, contiguous=False), logits.stride(0),
        address("target", target, I64), address("weight", weight, F32), ignore_index, label_smoothing, z_loss,
        softcap or 0.0, scale, address("loss", loss, F32), addressof(loss_sum),
        address("stats", stats, F32, contiguous=False), stats.stride(0),
        address("dlogits", dlogits, dtype, contiguous=False), 0 if dlogits is None else dlogits.stride(0),
        address("scratch", scratch, F32), m, v, threads(),
    )  # fmt: skip


def read_slice(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    state: Tensor,
    loss: Tensor,
    loss_sum: c_double,
    stats: Tensor,
    first: int,
    V: int,
) -> None:
    """The forward on some classes of every row, from class `first` on, without a gradient: state (M, 5) is float64 and
    kept from slice to slice; the last one fills loss and stats and adds to loss_sum. weight is all of (V,)."""
    dtype, (m, count) = logits.dtype, logits.shape
    extension().cross_entropy_slice(
        DTYPES[dtype], address("logits", logits, dtype, contiguous=False), logits.stride(0),
        address("target", target, I64), address("weight", weight, F32), ignore_index, label_smoothing, z_loss,
        softcap or 0.0, address("state", state, F64), address("loss", loss, F32), addressof(loss_sum),
        address("stats", stats, F32, contiguous=False), stats.stride(0), m, first, count, V, threads(),
    )  # fmt: skip


def backward_rows(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    stats: Tensor,
    dlogits: Tensor,
    transposed: Tensor | None = None,
    first: int = 0,
    V: int | None = None,
) -> None:
    """The kernel on rows whose labels were checked; dy is float32, () or (M,) of any stride. Of V classes (those there
    are, unless given) logits and dlogits hold some from class `first` on; transposed gets dlogits once more."""
    dtype, (m, count) = logits.dtype, logits.shape
    extension().cross_entropy_backward(
        DTYPES[dtype], address("logits", logits, dtype, contiguous=False), logits.stride(0),
        address("target", target, I64), address("weight", weight, F32), ignore_index, label_smoothing, z_loss,
        softcap or 0.0, address("stats", stats, F32, contiguous=False), stats.stride(0),
        address("dy", dy, F32, contiguous=False), dy.stride(0) if dy.dim() else 0, scale,
        address("dlogits", dlogits, dtype, contiguous=False), dlogits.stride(0),
        address("transposed", transposed, dtype, contiguous=False), 0 if transposed is None else transposed.stride(0),
        m, first, count, count if V is None else V, threads(),
    )  # fmt: skip


def room(V: int) -> Tensor:
    """The forward kernel's scratch."""
    return empty((threads() * extension().cross_entropy_room(V),), F32)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_grad: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = logits.shape
    x, target, w = rows(logits), target.contiguous(), float32(weight)
    total = check_labels(target, w, ignore_index, v)
    loss, loss_sum, stats = empty((m,), F32), c_double(), empty((3, m), F32)
    dlogits = None if not needs_grad else empty((m, v), logits.dtype) if out is None else x
    forward_rows(
        x, target, w, ignore_index, label_smoothing, z_loss, softcap, reciprocal(total, reduction),
        loss, loss_sum, stats, dlogits, room(v),
    )  # fmt: skip
    if out is not None and x.data_ptr() != out.data_ptr():  # rows() made a copy
        out.copy_(x)
    made = empty((0,), logits.dtype) if dlogits is None or out is not None else dlogits
    return reduced(loss, loss_sum, total, reduction), stats, made


def backward(
    dy: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    stats: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    x, target, w = rows(logits), target.contiguous(), float32(weight)
    total = check_labels(target, w, ignore_index, logits.shape[1])
    dlogits = empty(logits.shape, logits.dtype) if out is None else x
    backward_rows(
        dy.to(F32), x, target, w, ignore_index, label_smoothing, z_loss, softcap, reciprocal(total, reduction),
        stats, dlogits,
    )  # fmt: skip
    if out is None:
        return dlogits
    if x.data_ptr() != out.data_ptr():
        out.copy_(x)
    return empty((0,), logits.dtype)
