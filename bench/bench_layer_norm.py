"""layer_norm and add_layer_norm, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, norm_cases, pytest_suite
from fastlm import ops


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return eager(h, weight, bias), h


def cases() -> Iterator[Case]:
    return norm_cases("layer_norm", 2, (ops.layer_norm, eager), (ops.add_layer_norm, eager_add))


test_layer_norm = pytest_suite(cases)
