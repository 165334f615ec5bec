"""rms_norm and add_rms_norm, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(768, 128), (4096, 768), (8192, 1024)]
DTYPES = [torch.float32, torch.bfloat16]


def eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return eager(h, weight), h


def inputs(m: int, n: int, dtype: torch.dtype, *, residual: bool) -> list[Tensor]:
    shapes = [(m, n)] * (2 if residual else 1) + [(n,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def cases() -> Iterator[Case]:
    for m, n in SHAPES:
        for dtype in DTYPES:
            size = m * n * dtype.itemsize
            yield Case(
                "rms_norm",
                f"{m}x{n}",
                dtype,
                lambda m=m, n=n, dtype=dtype: inputs(m, n, dtype, residual=False),
                {"fastlm": ops.rms_norm, "eager": eager, "compile": eager},
                bytes=5 * size,
            )
            yield Case(
                "add_rms_norm",
                f"{m}x{n}",
                dtype,
                lambda m=m, n=n, dtype=dtype: inputs(m, n, dtype, residual=True),
                {"fastlm": ops.add_rms_norm, "eager": eager_add, "compile": eager_add},
                bytes=8 * size,
            )


test_rms_norm = pytest_suite(cases)
