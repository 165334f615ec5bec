"""attention, causal, forward and backward, against torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, forward_only, pytest_suite
from fastlm import ops

SHAPES = [(12, 4, 64, 32), (8, 6, 256, 64), (4, 12, 1024, 64), (1, 8, 4096, 64), (1, 8, 2048, 128)]
DTYPES = [torch.float32, torch.bfloat16]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(b: int, h: int, s: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(b, s, h, d).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def cases(sizes: Sequence[tuple[int, int, int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for b, h, s, d in sizes:
        for dtype in DTYPES:
            size, product = b * h * s * d * dtype.itemsize, b * h * s * s * d  # 2 B H S S D, half of it causal
            make = lambda b=b, h=h, s=s, d=d, dtype=dtype: inputs(b, h, s, d, dtype)  # noqa: E731
            providers, shape = {"fastlm": fused, "sdpa": sdpa}, f"B{b} H{h} S{s} D{d}"
            yield Case("attention forward", shape, dtype, make, providers, 4 * size, 2 * product, forward_only)
            yield Case("attention", shape, dtype, make, providers, 11 * size, 7 * product)


test_attention = pytest_suite(cases)
