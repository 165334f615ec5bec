"""rope of queries and keys, forward and backward, against the usual formula in torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(8, 64, 4, 32), (4, 1024, 24, 64)]  # B, S, H, D
DTYPES = [torch.float32, torch.bfloat16]


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def inputs(b: int, s: int, h: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q and k as projections leave them: (B, S, H, D) seen as (B, H, S, D); tables of half and of full width."""
    angles = torch.arange(s)[:, None] * 10_000 ** (-torch.arange(0, d, 2) / d)
    q, k = (torch.randn(b, s, h, d).to(dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    wide = torch.cat((angles, angles), -1)
    return [q, k, angles.cos(), angles.sin(), wide.cos().to(dtype), wide.sin().to(dtype)]


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(ops.rope(q, k, cos, sin))


def eager(q: Tensor, k: Tensor, _cos: Tensor, _sin: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


PROVIDERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"fastlm": ours, "eager": eager, "compile": eager}


def cases(sizes: Sequence[tuple[int, int, int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for b, s, h, d in sizes:
        for dtype in DTYPES:
            yield Case(
                "rope",
                f"B{b} S{s} H{h} D{d}",
                dtype,
                lambda b=b, s=s, h=h, d=d, dtype=dtype: inputs(b, s, h, d, dtype),
                PROVIDERS,
                bytes=8 * b * s * h * d * dtype.itemsize,
                forward=1 / 2,
            )


test_rope = pytest_suite(cases)
