"""softmax and log_softmax, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(4096, 256), (2048, 4096), (256, 32000)]
DTYPES = [torch.float32, torch.bfloat16]


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for m, n in sizes:
        for dtype in DTYPES:
            for log in (False, True):
                eager = partial(torch.log_softmax if log else torch.softmax, dim=-1)
                yield Case(
                    "log_softmax" if log else "softmax",
                    f"{m}x{n}",
                    dtype,
                    lambda m=m, n=n, dtype=dtype: [torch.randn(m, n).to(dtype).requires_grad_()],
                    {"fastlm": partial(ops.softmax, log=log), "eager": eager, "compile": eager},
                    bytes=5 * m * n * dtype.itemsize,
                    forward=2 / 5,
                )


test_softmax = pytest_suite(cases)
