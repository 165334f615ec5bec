"""Parameters, gradients and states for the tests of adam."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import ops
from tests.ops.harness import sizes

SHAPES = sizes(
    [(3, 5), (), (0,), (8192,), (8193,), (2, 8191), (40_000,), (16,)],
    [(3, 5), (), (0,), (1024,), (1025,), (2, 511), (4097,), (16,)],
)
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


class Problem:
    """Parameters, gradients and state as adam_step takes them."""

    def __init__(self, params: list[Tensor], *, amsgrad: bool = False, masters: bool = False, seeds: bool = False):
        dtype = torch.float64 if params[0].dtype is torch.float64 else torch.float32
        self.params = [p.clone() for p in params]
        self.exp_avgs = [torch.zeros_like(p, dtype=dtype) for p in params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=dtype) for p in params]
        self.steps = [torch.zeros(()) for _ in params]
        self.options: dict[str, Any] = {}
        if amsgrad:
            self.options["max_exp_avg_sqs"] = [torch.zeros_like(p, dtype=dtype) for p in params]
        if masters:
            self.options["master_params"] = [p.to(dtype) for p in params]
        if seeds:
            self.options["rounding_seeds"] = [1000 + i for i in range(len(params))]

    def step(self, grads: list[Tensor], **options: Any) -> None:
        ops.adam_step(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **{"lr": 1e-2, **self.options, **options}
        )

    def tensors(self) -> list[Tensor]:
        lists = [v for k, v in self.options.items() if k != "rounding_seeds"]
        return [t for ts in (self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, *lists) for t in ts]


def make(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


BITS = frozenset({"state_bits"})


def quantized(params: list[Tensor], scale: float = 1.0) -> Problem:
    """A problem whose moments are codes of random ones."""
    problem = Problem(params)
    problem.options["exp_avg_absmaxes"], problem.options["exp_avg_sq_absmaxes"] = [], []
    for i, p in enumerate(params):
        mean = torch.randn_like(p, dtype=torch.float32) * 0.1 * scale
        square = torch.randn_like(mean).square() * scale**2
        problem.exp_avgs[i], absmax = ops.adam.quantize(mean, signed=True)
        problem.options["exp_avg_absmaxes"].append(absmax)
        problem.exp_avg_sqs[i], absmax = ops.adam.quantize(square, signed=False)
        problem.options["exp_avg_sq_absmaxes"].append(absmax)
    return problem


def duplicate(problem: Problem) -> Problem:
    return copy.deepcopy(problem)
