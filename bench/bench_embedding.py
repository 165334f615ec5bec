"""embedding, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(4096, 256, 384), (4096, 50304, 768)]  # M, V, N
DTYPES = [torch.float32, torch.bfloat16]


def inputs(m: int, v: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Ids as text has them: the frequency falls with the rank."""
    ids = (v ** torch.rand(m)).long().clamp_max(v - 1)
    return [ids, torch.randn(v, n).to(dtype).requires_grad_()]


def cases(sizes: Sequence[tuple[int, int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for m, v, n in sizes:
        for dtype in DTYPES:
            yield Case(
                "embedding",
                f"{m} of {v}x{n}",
                dtype,
                lambda m=m, v=v, n=n, dtype=dtype: inputs(m, v, n, dtype),
                {"fastlm": ops.embedding, "eager": F.embedding, "compile": F.embedding},
                bytes=(3 * m + v) * n * dtype.itemsize,
                forward=2 * m / (3 * m + v),
            )


test_embedding = pytest_suite(cases)
