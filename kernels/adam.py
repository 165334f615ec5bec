"""Adam and AdamW over all tensors of a list in Triton, and the sum of squares that clipping needs.

  begin     a thread for each tensor: step += 1, bias corrections and scale in float64, to four float32 a tensor
  step      a program for each CHUNK elements of a tensor: owner[program] names the tensor, a table of int64 its sizes
            and addresses; g = grad * scale [+ weight_decay * p], m and v updated, p -= lr * (m^ / (sqrt(v^) + eps)
            [+ weight_decay * p]); found_inf != 0 makes every program, begin's too, write nothing
  norm      squares of a chunk in float32, four terms a lane, then float64: one number a chunk; one program adds those
Memory: step reads p, g, m, v and writes p, m, v once: 28 bytes an element in float32, 22 with 16-bit parameters (30
with master copies), 16 and 10 with 8-bit states; norm reads the gradients. Tables: 8 bytes a chunk, 100 a tensor.
Nothing waits for the device: lr, step, grad_scale and found_inf are read there. Only the gradients' addresses travel
at each step, and only when they changed, through pinned memory.
Papers: Kingma and Ba 2014 (arXiv:1412.6980), Loshchilov and Hutter 2017 (arXiv:1711.05101), AMSGrad: Reddi et al. 2018
(openreview ryQu7f-RZ), stochastic rounding: Zamirai et al. 2020 (arXiv:2010.06192), 8-bit states: Dettmers et al. 2021
(arXiv:2110.02861).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._walk import Tensors, filled
from fastlm.kernels._blockwise import dequantize, quantize
from fastlm.kernels._launch import cdiv, empty, launch

CHUNK, NORM_CHUNK = 4096, 16384
"""Elements of a program. Finding its tensor takes two dependent reads, so it stays for several blocks."""
BLOCK, WARPS = 1024, 8
"""Four elements a thread: float32 in 16 bytes, 16-bit tensors in 8. With eight a thread the compiler moves 16-bit
elements through shared memory to where float32 ones lie, eight barriers a program (seen in the code for sm_90)."""
BLOCK_8BIT, WARPS_8BIT = 256, 1
"""One scale's elements in one warp: its largest magnitude needs no barrier."""
TENSORS = 128
"""Of a program of begin."""
F32 = torch.float32
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Rows of the table, a column for each tensor: int64.
ROWS = ("size", "first", "step", "param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "seed",
        "exp_avg_absmax", "exp_avg_sq_absmax")  # fmt: skip
SIZE, FIRST, STEP, PARAM, MEAN, SQUARE, PEAK, MASTER, SEED, MEAN_MAX, SQUARE_MAX = map(tl.constexpr, range(len(ROWS)))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _begin(
    table, scalars, lr, lr_at, grad_scale, found_inf, count, log_beta1, log_beta1_rest, log_beta2, log_beta2_rest,
    weight_decay, MAXIMIZE: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    inside = tensor < count
    at = tl.load(table + STEP * count + tensor, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    now = tl.load(at, mask=inside, other=0.0) + 1.0
    live = count
    if found_inf is not None:
        live = tl.where(tl.load(found_inf) == 0, count, 0)
    tl.store(at, now, mask=tensor < live)
    # beta^step is e^(step log beta): a float argument holds 24 bits, so the logarithm comes in two.
    t = now.to(tl.float64)
    bias1 = 1.0 - tl.exp(t * log_beta1 + t * log_beta1_rest)
    bias2 = 1.0 - tl.exp(t * log_beta2 + t * log_beta2_rest)
    rate = tl.full((TENSORS,), 1.0, tl.float64)
    if lr_at is not None:
        rate *= tl.load(lr_at).to(tl.float64)
    else:
        rate *= lr
    scale = tl.full((TENSORS,), -1.0 if MAXIMIZE else 1.0, tl.float64)
    if grad_scale is not None:
        scale /= tl.load(grad_scale).to(tl.float64)
    tl.store(scalars + tensor, (rate / bias1).to(tl.float32), mask=inside)
    tl.store(scalars + count + tensor, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=inside)
    tl.store(scalars + 2 * count + tensor, (rate * weight_decay).to(tl.float32), mask=inside)
    tl.store(scalars + 3 * count + tensor, scale.to(tl.float32), mask=inside)


@triton.jit
def _pointer(row, start, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in the table, advanced to the chunk. A row that is not in use holds 0."""
    pointer = tl.load(row).to(tl.pointer_type(KIND))
    if ALIGNED:  # said of the pointer: Triton forgets it of the integer
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _key(seed, step, start):
    """splitmix64's finalizer (Steele et al. 2014) over seed, step and the upper half of the index."""
    high = (start >> 32).to(tl.uint64, bitcast=True)
    z = seed.to(tl.uint64, bitcast=True) + step.to(tl.int64).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z += high * 0xD1342543DE82EF95
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _random_bits(index, key):
    """32 bits for each element, as fastlm/reference/adam.py."""
    x = index ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + (key >> 32).to(tl.uint32)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_randomly(w, random, KIND: tl.constexpr):
    """w to one of its two neighbours in KIND, with probability by nearness; then it converts exactly."""
    bits = w.to(tl.uint32, bitcast=True)
    if KIND == tl.bfloat16:  # noqa: SIM300
        rounded = ((bits + (random >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((bits + (random >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # below 2^-14 the neighbours are 2^-24 apart: round down after adding a random part of that
        small = tl.floor(w * 16777216.0 + (random >> 8).to(tl.float32) * 5.9604644775390625e-08)
        rounded = tl.where(tl.abs(w) < 6.103515625e-05, small * 5.9604644775390625e-08, rounded)
    return tl.where(w == w, rounded, w)


@triton.jit
def _block(
    param, grad, mean, square, peak, master, mean_max, square_max, key, start, offset, left,
    lr, inverse, decay, scale, coupled, one_minus_beta1, beta2, one_minus_beta2, eps,
    KIND: tl.constexpr, AMSGRAD: tl.constexpr, ROUNDING: tl.constexpr, DECAY: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from the offset on; the pointers point to the chunk."""
    at = offset + tl.arange(0, BLOCK)
    if FULL:  # no mask: the compiler could not tell that it is the same for 16 bytes
        inside, filled = None, None
    else:
        inside, filled = at < left, at < left
    w = tl.load(param + at, mask=inside).to(tl.float32)
    if ROUNDING == "master":
        # A parameter that is not its master's rounding was changed from outside (weights were loaded): it counts.
        exact = tl.load(master + at, mask=inside)
        w = tl.where(w == exact.to(KIND).to(tl.float32), exact, w)
    g = tl.load(grad + at, mask=inside).to(tl.float32) * scale
    if DECAY == "coupled":
        g += w * coupled
    first = tl.load(mean + at, mask=inside)
    second = tl.load(square + at, mask=inside)
    if BITS == 8:
        of = offset // 256 + tl.arange(0, BLOCK // 256)
        if not FULL:
            filled = of * 256 < left
        first = dequantize(first, tl.load(mean_max + of, mask=filled), True, BLOCK // 256)
        second = dequantize(second, tl.load(square_max + of, mask=filled), False, BLOCK // 256)
    first += (g - first) * one_minus_beta1
    second = second * beta2 + g * one_minus_beta2 * g
    if BITS == 8:
        if not FULL:  # a largest magnitude over no more than the tensor
            first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        codes, largest = quantize(first, True, BLOCK // 256)
        tl.store(mean + at, codes, mask=inside)
        tl.store(mean_max + of, largest, mask=filled)
        codes, largest = quantize(second, False, BLOCK // 256)
        tl.store(square + at, codes, mask=inside)
        tl.store(square_max + of, largest, mask=filled)
    else:
        tl.store(mean + at, first, mask=inside)
        tl.store(square + at, second, mask=inside)
    if AMSGRAD:
        highest = tl.load(peak + at, mask=inside)
        second = tl.where(highest > second, highest, second)  # a NaN in second stays, as in torch.maximum
        tl.store(peak + at, second, mask=inside)
    update = first / (tl.sqrt(second) * inverse + eps) * lr
    if DECAY == "decoupled":
        update += w * decay
    w -= update
    if ROUNDING == "master":
        tl.store(master + at, w, mask=inside)
    if ROUNDING == "stochastic":
        w = _round_randomly(w, _random_bits((start + at).to(tl.uint32), key), KIND)
    tl.store(param + at, w.to(KIND), mask=inside)


@triton.jit
def _step(
    owner, table, grads, scalars, found_inf, count, coupled, one_minus_beta1, beta2, one_minus_beta2, eps,
    KIND: tl.constexpr, GRAD: tl.constexpr, AMSGRAD: tl.constexpr, ROUNDING: tl.constexpr, DECAY: tl.constexpr,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    row = table + tensor
    start = (chunk - tl.load(row + FIRST * count)) * CHUNK
    left = tl.load(row + SIZE * count) - start
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    STATE: tl.constexpr = tl.uint8 if BITS == 8 else tl.float32
    param = _pointer(row + PARAM * count, start, KIND, ALIGNED)
    grad = _pointer(grads + tensor, start, GRAD, ALIGNED)
    mean = _pointer(row + MEAN * count, start, STATE, ALIGNED)
    square = _pointer(row + SQUARE * count, start, STATE, ALIGNED)
    peak = _pointer(row + PEAK * count, start, tl.float32, ALIGNED)
    master = _pointer(row + MASTER * count, start, tl.float32, ALIGNED)
    mean_max = _pointer(row + MEAN_MAX * count, start // 256, tl.float32, ALIGNED)
    square_max = _pointer(row + SQUARE_MAX * count, start // 256, tl.float32, ALIGNED)
    lr = tl.load(scalars + tensor)
    inverse = tl.load(scalars + count + tensor)
    decay = tl.load(scalars + 2 * count + tensor)
    scale = tl.load(scalars + 3 * count + tensor)
    key = start
    if ROUNDING == "stochastic":
        step = tl.load(tl.load(row + STEP * count).to(tl.pointer_type(tl.float32)))
        key = _key(tl.load(row + SEED * count), step, start)
    if left >= CHUNK:
        for offset in range(0, CHUNK, BLOCK):
            _block(param, grad, mean, square, peak, master, mean_max, square_max, key, start, offset, left,
                   lr, inverse, decay, scale, coupled, one_minus_beta1, beta2, one_minus_beta2, eps,
                   KIND, AMSGRAD, ROUNDING, DECAY, BITS, True, BLOCK)  # fmt: skip
    else:
        for offset in range(0, left.to(tl.int32), BLOCK):
            _block(param, grad, mean, square, peak, master, mean_max, square_max, key, start, offset, left,
                   lr, inverse, decay, scale, coupled, one_minus_beta1, beta2, one_minus_beta2, eps,
                   KIND, AMSGRAD, ROUNDING, DECAY, BITS, False, BLOCK)  # fmt: skip


@triton.jit
def _squares(
    owner, table, grads, parts, count,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(owner + chunk)
    start = (chunk - tl.load(table + FIRST * count + tensor)) * CHUNK
    left = tl.load(table + SIZE * count + tensor) - start
    grad = _pointer(grads + tensor, start, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float64)
    if left >= CHUNK:
        for offset in range(0, CHUNK, 4 * BLOCK):
            four = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(4):
                x = tl.load(grad + offset + i * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
                four += x * x
            total += four.to(tl.float64)
    else:
        for offset in range(0, left.to(tl.int32), BLOCK):
            at = offset + tl.arange(0, BLOCK)
            x = tl.load(grad + at, mask=at < left, other=0).to(tl.float32)
            total += (x * x).to(tl.float64)
    tl.store(parts + chunk, tl.sum(total))


@triton.jit
def _total(parts, result, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < count, other=0.0)
    tl.store(result, tl.sum(total))


# --- tables ----------------------------------------------------------------------------------------------------------

ARENA = 1 << 16
_arena: list[Tensor] = []
"""Pinned memory for the uploads that CUDA graphs record. A replay reads it again at any time, so no part of it is ever
written twice or given back; it is made before a capture, which must not allocate pinned memory."""
_taken = 0
_replayed: list[object] = []
"""Tables that a CUDA graph reads: it may outlive the optimizer's own reference to them."""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(size: int, device: torch.device) -> Tensor:
    global _taken
    capturing = _capturing(device)
    if not _arena or _taken + (size if capturing else ARENA // 2) > len(_arena[-1]):
        _arena.append(torch.empty(max(size if capturing else 0, ARENA), dtype=torch.int64, pin_memory=True))
        _taken = 0
    if not capturing:
        return torch.empty(size, dtype=torch.int64, pin_memory=True)  # torch reuses it when the copy is done
    part = _arena[-1][_taken : _taken + size]
    _taken += size
    return part


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """int64 numbers on the device, in the order of the stream; nothing waits."""
    if device.type == "cuda":
        host = _pinned(len(values), device)
        host.numpy()[:] = values
        return torch.empty(len(values), dtype=torch.int64, device=device).copy_(host, non_blocking=True)
    if device.type == "meta":
        return torch.empty(len(values), dtype=torch.int64, device=device)
    return torch.from_numpy(np.array(values, dtype=np.int64))


def chunks(sizes: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """For each program the tensor it works on, and for each tensor its first program; int64."""
    counts = -(-np.array(sizes, dtype=np.int64) // chunk)
    return np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - counts


def _check(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raises unless the tensor's address can be taken; a kernel trusts what the table holds."""
    kind = type(tensor)
    if kind is not Tensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(f"{name} is a {kind.__name__}, which has no memory of its own; a real tensor is needed")
    if tensor.layout is not torch.strided or tensor.is_neg():
        raise TypeError(f"{name} must be a plain strided tensor, got {tensor.layout} on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")


def _aligned(addresses: Sequence[int]) -> bool:
    return not functools.reduce(int.__or__, addresses, 0) & 15


class Prepared(Tensors):
    """The tensors of one call, and the tables on the device that name them. There are no shadows here."""

    def __init__(self, *lists: Any) -> None:
        super().__init__(_check, *lists)
        self.rounding = "master" if self.masters else "stochastic" if self.stochastic else "nearest"
        self.aligned = all(_aligned(self.rows[name]) for name in ROWS if name not in ("size", "first", "step", "seed"))
        owner, first = chunks(self.walk.sizes, CHUNK)
        self.programs = len(owner)
        self.owner = _upload(owner, self.device)
        rows = {**self.rows, "first": first.tolist()}
        self.uploaded = _upload(np.array([rows[name] for name in ROWS], dtype=np.int64).reshape(-1), self.device)
        self.where: tuple[list[int], Tensor] | None = None

    def upload(self, addresses: list[int]) -> Tensor:
        """Gradients' addresses on the device. A CUDA graph gets a row of its own: replays write it, no other step."""
        if _capturing(self.device):
            _replayed.append((self.owner, self.uploaded, self.walk.copies))
            return _upload(np.array(addresses, dtype=np.int64), self.device)
        if self.where is None or self.where[0] != addresses:
            self.where = addresses, _upload(np.array(addresses, dtype=np.int64), self.device)
        return self.where[1]


def _split(x: float) -> tuple[float, float]:
    """x as the sum of two float32."""
    high = float(np.float32(x))
    return high, x - high if math.isfinite(high) else 0.0


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device, non_blocking=True)


def forward(
    prepared: Prepared,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device, count, walk = prepared.device, prepared.count, prepared.walk
    kept, dtype = prepared.gradients(grads)
    addresses = [g.data_ptr() for g in kept]
    lr_at = lr if isinstance(lr, Tensor) and lr.device == device else None
    found_inf = _scalar(found_inf, device)
    scalars = empty((4, count), prepared.uploaded, F32)
    walk.begin()
    launch(
        _begin, (cdiv(count, TENSORS),), prepared.uploaded, scalars, 0.0 if lr_at is not None else float(lr), lr_at,
        _scalar(grad_scale, device), found_inf, count, *_split(math.log(beta1) if beta1 else -math.inf),
        *_split(math.log(beta2) if beta2 else -math.inf), float(weight_decay), MAXIMIZE=maximize, TENSORS=TENSORS,
        num_warps=4,
    )  # fmt: skip
    launch(
        _step, (prepared.programs,), prepared.owner, prepared.uploaded, prepared.upload(addresses), scalars, found_inf,
        count, float(weight_decay), 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps), KIND=DTYPES[prepared.dtype],
        GRAD=DTYPES[dtype], AMSGRAD=prepared.amsgrad, ROUNDING=prepared.rounding,
        DECAY="none" if weight_decay == 0 else "decoupled" if decoupled else "coupled", BITS=prepared.bits,
        ALIGNED=prepared.aligned and _aligned(addresses), CHUNK=CHUNK,
        BLOCK=BLOCK if prepared.bits == 32 else BLOCK_8BIT, num_warps=WARPS if prepared.bits == 32 else WARPS_8BIT,
    )  # fmt: skip
    walk.end()


_norm_tables: dict[object, tuple[int, Tensor, Tensor]] = {}


def _norm_table(sizes: tuple[int, ...], device: torch.device) -> tuple[int, Tensor, Tensor]:
    """Programs, their tensors, and sizes and first programs: what does not change from one norm to the next."""
    found = _norm_tables.get((sizes, device))
    if found is None:
        owner, first = chunks(sizes, NORM_CHUNK)
        table = np.concatenate([np.array(sizes, dtype=np.int64), first])
        found = len(owner), _upload(owner, device), _upload(table, device)
        if not _capturing(device):  # else the memory is filled by replays alone
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # any stream may use it from here on; and let go of those it replaces
            if len(_norm_tables) >= 64:
                _norm_tables.clear()
            _norm_tables[sizes, device] = found
    if _capturing(device):
        _replayed.append(found)
    return found


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    kept, device = filled(grads, _check), grads[0].device
    addresses = [g.data_ptr() for g in kept]
    programs, owner, table = _norm_table(tuple(g.numel() for g in kept), device)
    where = _upload(np.array(addresses, dtype=np.int64), device)
    parts, result = empty((programs,), where, torch.float64), empty((), where, torch.float64)
    launch(
        _squares, (programs,), owner, table, where, parts, len(kept), GRAD=DTYPES[kept[0].dtype],
        ALIGNED=_aligned(addresses), CHUNK=NORM_CHUNK, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    launch(_total, (1,), parts, result, programs, BLOCK=BLOCK, num_warps=8)
    return result
