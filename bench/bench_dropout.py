"""dropout of a branch and the addition of the residual stream, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops


def _ours(x: Tensor, residual: Tensor) -> Tensor:
    return ops.dropout_add(x, residual, 0.2)


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    return residual + F.dropout(x, 0.2)


def _inputs(m: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(m, n).to(dtype).requires_grad_(), torch.randn(m, n).requires_grad_()]


def cases(sizes: Sequence[tuple[int, int]] = ((768, 128), (4096, 768))) -> Iterator[Case]:
    for m, n in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                "dropout_add",
                f"{m}x{n}",
                dtype,
                lambda m=m, n=n, dtype=dtype: _inputs(m, n, dtype),
                {"fastlm": _ours, "eager": _eager, "compile": _eager},
                bytes=m * n * (2 * dtype.itemsize + 3 * 4),
                tolerance=None,  # other elements are dropped
            )


test_dropout = pytest_suite(cases)
