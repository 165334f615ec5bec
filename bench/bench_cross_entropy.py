"""cross_entropy, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(768, 65), (2048, 8192), (2048, 50304)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(M: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(M, V).to(dtype).requires_grad_(), torch.randint(V, (M,))]


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for M, V in sizes:
        for dtype in DTYPES:
            yield Case(
                "cross_entropy",
                f"{M}x{V}",
                dtype,
                lambda M=M, V=V, dtype=dtype: inputs(M, V, dtype),
                {"fastlm": ops.cross_entropy, "eager": F.cross_entropy, "compile": F.cross_entropy},
                bytes=2 * M * V * dtype.itemsize,
                forward=1 / 2,
            )


test_cross_entropy = pytest_suite(cases)
