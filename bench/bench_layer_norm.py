"""layer_norm and add_layer_norm, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from bench.harness import NORM_SHAPES, Case, norm_cases, pytest_suite
from fastlm import ops


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return eager(h, weight, bias), h


def cases(sizes: Sequence[tuple[int, int]] = tuple(NORM_SHAPES)) -> Iterator[Case]:
    return norm_cases("layer_norm", 2, (ops.layer_norm, eager), (ops.add_layer_norm, eager_add), sizes)


test_layer_norm = pytest_suite(cases)
