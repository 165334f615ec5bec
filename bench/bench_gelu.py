"""gelu, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(768, 512), (4096, 3072)]
DTYPES = [torch.float32, torch.bfloat16]


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for m, n in sizes:
        for dtype in DTYPES:
            for approximate in ("none", "tanh"):
                eager = partial(F.gelu, approximate=approximate)
                yield Case(
                    "gelu" if approximate == "none" else "gelu tanh",
                    f"{m}x{n}",
                    dtype,
                    lambda m=m, n=n, dtype=dtype: [torch.randn(m, n).to(dtype).requires_grad_()],
                    {"fastlm": partial(ops.gelu, approximate=approximate), "eager": eager, "compile": eager},
                    bytes=5 * m * n * dtype.itemsize,
                    forward=2 / 5,
                )


test_gelu = pytest_suite(cases)
