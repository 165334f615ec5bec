"""swiglu and geglu of a packed product, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(768, 384), (4096, 3072)]
DTYPES = [torch.float32, torch.bfloat16]


def eager_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def eager_geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate) * up


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for m, n in sizes:
        for dtype in DTYPES:
            for name, ours, eager in (("swiglu", ops.swiglu, eager_swiglu), ("geglu", ops.geglu, eager_geglu)):
                yield Case(
                    name,
                    f"{m}x(2x{n})",
                    dtype,
                    lambda m=m, n=n, dtype=dtype: [torch.randn(m, 2 * n).to(dtype).requires_grad_()],
                    {"fastlm": ours, "eager": eager, "compile": eager},
                    bytes=8 * m * n * dtype.itemsize,
                    forward=3 / 8,
                )


test_glu = pytest_suite(cases)
