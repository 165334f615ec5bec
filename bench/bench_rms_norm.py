"""rms_norm and add_rms_norm, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from bench.harness import NORM_SHAPES, Case, norm_cases, pytest_suite
from fastlm import ops


def eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return eager(h, weight), h


def cases(sizes: Sequence[tuple[int, int]] = tuple(NORM_SHAPES)) -> Iterator[Case]:
    return norm_cases("rms_norm", 1, (ops.rms_norm, eager), (ops.add_rms_norm, eager_add), sizes)


test_rms_norm = pytest_suite(cases)
