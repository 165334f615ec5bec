"""prepare(), forward() and norm() of adam in plain PyTorch, one tensor at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.reference import wide

U32 = 0xFFFFFFFF
U64 = 0xFFFFFFFFFFFFFFFF


@dataclass
class Prepared:
    params: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    master_params: Sequence[Tensor]
    seeds: Sequence[int]
    exp_avg_absmaxes: Sequence[Tensor]
    exp_avg_sq_absmaxes: Sequence[Tensor]
    shadow_params: Sequence[Tensor] = ()

    def current(self) -> bool:
        return True  # tensors are read through PyTorch, wherever they lie


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
    if found_inf is not None and found_inf.item():
        return
    lr = float(lr)
    scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    for i, param in enumerate(prepared.params):
        prepared.steps[i].add_(1)
        step = prepared.steps[i].item()
        w = wide(param)
        if prepared.master_params:
            master = prepared.master_params[i]
            # A parameter that is not its master's rounding was changed from outside (weights were loaded): it counts.
            w = torch.where(param == master.to(param.dtype), master, w)
        grad = grads[i].to(w.dtype) * (-scale if maximize else scale)
        if weight_decay != 0 and not decoupled:
            grad = grad + w * weight_decay
        first, second = prepared.exp_avgs[i], prepared.exp_avg_sqs[i]
        if prepared.exp_avg_absmaxes:
            first = dequantize(first, prepared.exp_avg_absmaxes[i], signed=True)
            second = dequantize(second, prepared.exp_avg_sq_absmaxes[i], signed=False)
        low = first.dtype is torch.bfloat16
        if low:
            first, second = first.float(), second.float()
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if prepared.exp_avg_absmaxes:
            quantize(first, prepared.exp_avgs[i], prepared.exp_avg_absmaxes[i], signed=True)
            quantize(second, prepared.exp_avg_sqs[i], prepared.exp_avg_sq_absmaxes[i], signed=False)
        if low:
            seed = prepared.seeds[i] if prepared.seeds else 0
            random = _random_bits(param, (seed + 0x632BE59BD9B4E019) & U64, int(step))
            prepared.exp_avgs[i].copy_(_round_randomly(first, random, torch.bfloat16))
            prepared.exp_avg_sqs[i].copy_(_round_randomly(second, (random << 16) & U32, torch.bfloat16))
        if prepared.max_exp_avg_sqs:
            second = torch.maximum(prepared.max_exp_avg_sqs[i], second, out=prepared.max_exp_avg_sqs[i])
        update = first / (second.sqrt() / math.sqrt(1 - beta2**step) + eps) * (lr / (1 - beta1**step))
        if weight_decay != 0 and decoupled:
            update = update + w * (lr * weight_decay)
        w = w - update
        if prepared.master_params:
            prepared.master_params[i].copy_(w)
        if prepared.seeds:
            w = _round_randomly(w, _random_bits(param, prepared.seeds[i], int(step)), param.dtype)
        param.copy_(w)
        if prepared.shadow_params:
            prepared.shadow_params[i].copy_(w)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64, 0-d."""
    return torch.stack([wide(g).square().sum(dtype=torch.float64) for g in grads]).sum()


def _random_bits(param: Tensor, seed: int, step: int) -> Tensor:
    """32 bits for each element, hashed from (seed, step, index): csrc/cpu/adam.cpp, in int64. The index counts in the
    parameter's memory order."""
    z = (seed + step * 0x9E3779B97F4A7C15) & U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
    z ^= z >> 31
    x = torch.arange(param.numel(), device=param.device) & U32
    x = x ^ (z & U32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & U32
    x = ((((x ^ (x >> 15)) + (z >> 32)) & U32) * 0x846CA68B) & U32
    x = x ^ (x >> 16)
    stride = param.stride()
    order = sorted(range(param.dim()), key=lambda d: (-stride[d], d))
    inverse = sorted(range(param.dim()), key=order.__getitem__)
    return x.view([param.shape[d] for d in order]).permute(inverse)


def _round_randomly(w: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """w (float32) rounded to one of its two neighbours in dtype, with probability by nearness."""
    u = w.contiguous().view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = ((u + (random >> 16).to(torch.int32)) & -0x10000).view(torch.float32)
    elif dtype is torch.float16:
        rounded = ((u + (random >> 19).to(torch.int32)) & -0x2000).view(torch.float32)
        small = torch.floor(w * 2.0**24 + (random >> 8).float() * 2.0**-24) * 2.0**-24
        rounded = torch.where(w.abs() < 2.0**-14, small, rounded)
    else:
        return w
    return torch.where(w.isnan(), w, rounded)


# --- 8-bit states ----------------------------------------------------------------------------------------------------

BLOCK = 256
"""Elements that share a scale, in memory order; the last block may be shorter."""


@functools.cache
def code_book(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values in ascending order, and the 255 numbers halfway between neighbours; float32.

    The dynamic tree of Dettmers et al. 2021 (arXiv:2110.02861): decade d of (0, 1], d = -7 ... -1, holds 2^(d+7)
    (signed, of either sign) or 2^(d+8) values, the middles of as many equal parts of [10^d, 10^(d+1)]; and 0, and 1.
    An unsigned number above 0 is never 0: a second moment lost would make the next step as large as eps is small.
    """
    top = 6 if signed else 7
    n = torch.arange(1 if signed else 2, 2 << top, dtype=torch.float32)
    _, places = torch.frexp(n)
    step = torch.exp2(1.0 - places)
    # exact but for the last two products, so that a kernel can compute the same bits
    values = (9 * (n + 0.5) * step - 8) * (10.0 ** (places - 1).double()).float() * (1e-7 if signed else 1e-8)
    zero, one = torch.zeros(1), torch.ones(1)
    book = torch.cat([-values.flip(0), zero, values, one] if signed else [zero, values, one])
    halfway = ((book[1:].double() + book[:-1].double()) / 2).float()
    if not signed:
        halfway[0] = 2.0**-149
    return book.to(device), halfway.to(device)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as they lie, 1-d, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """float32 of the codes' shape and strides: the code's value times the largest magnitude of its block.

    Args:
        codes: uint8, dense.
        absmax: (ceil(numel / 256),) float32.
    """
    book, _ = code_book(signed, codes.device)
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    result = torch.empty_like(codes, dtype=torch.float32)
    _in_memory_order(result).copy_(book[_in_memory_order(codes).int()] * scale)
    return result


def quantize(values: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    """The inverse of dequantize(), to the nearest code, into codes and absmax; values has the strides of codes."""
    _, halfway = code_book(signed, codes.device)
    flat = torch.nn.functional.pad(_in_memory_order(values), (0, -values.numel() % BLOCK)).view(len(absmax), BLOCK)
    torch.amax(flat.abs(), dim=1, out=absmax)
    usable = (absmax >= torch.finfo(torch.float32).tiny) & absmax.isfinite()
    inverse = torch.where(usable, absmax.reciprocal(), 0.0)
    scaled = torch.where(usable[:, None], flat, 0.0) * inverse[:, None]
    _in_memory_order(codes).copy_(torch.bucketize(scaled, halfway, right=True).view(-1)[: codes.numel()])
