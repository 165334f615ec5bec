"""kl_div from logits, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(2048, 1000), (256, 32000)]
DTYPES = [torch.float32, torch.bfloat16]


def eager(logits: Tensor, target: Tensor) -> Tensor:
    q, p = (x.float().log_softmax(-1) for x in (logits, target))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for m, v in sizes:
        for dtype in DTYPES:
            yield Case(
                "kl_div",
                f"{m}x{v}",
                dtype,
                lambda m=m, v=v, dtype=dtype: [
                    torch.randn(m, v).to(dtype).requires_grad_(),
                    torch.randn(m, v).to(dtype),
                ],
                {"fastlm": ops.kl_div, "eager": eager, "compile": eager},
                bytes=5 * m * v * dtype.itemsize,
                forward=2 / 5,
            )


test_kl_div = pytest_suite(cases)
