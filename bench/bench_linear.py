"""linear, forward and backward, against torch eager and torch.compile: bfloat16, and bfloat16 under autocast from a
float32 weight. (float32 products are torch's own.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm.nn import functional

SHAPES = [(768, 128, 384), (768, 512, 128), (2048, 384, 1536), (2048, 1536, 384), (1024, 768, 3072)]
"""M, K, N: projections of small models, of 6 layers 384 wide, of GPT-2."""


def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return run


def inputs(M: int, K: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = torch.randn(M, K).bfloat16(), torch.randn(N, K) * K**-0.5, torch.randn(N)
    return [x.requires_grad_(), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]


def cases(sizes: Sequence[tuple[int, int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for M, K, N in sizes:
        for name, dtype in (("linear", torch.bfloat16), ("linear autocast", torch.float32)):
            wrap = autocast if dtype is torch.float32 else lambda f: f
            yield Case(
                name,
                f"{M}x{K}x{N}",
                torch.bfloat16,
                lambda M=M, K=K, N=N, dtype=dtype: inputs(M, K, N, dtype),
                {"fastlm": wrap(functional.linear), "eager": wrap(F.linear), "compile": wrap(F.linear)},
                flops=6.0 * M * K * N,
                forward=1 / 3,
            )


test_linear = pytest_suite(cases)
