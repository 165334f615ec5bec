"""cross_entropy, forward and backward, against torch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, pytest_suite
from fastlm import ops

SHAPES = [(768, 65), (2048, 8192), (2048, 50304)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(M: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(M, V).to(dtype).requires_grad_(), torch.randint(V, (M,))]


def cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for M, V in sizes:
        for dtype in DTYPES:
            yield Case(
                "cross_entropy",
                f"{M}x{V}",
                dtype,
                lambda M=M, V=V, dtype=dtype: inputs(M, V, dtype),
                {"fastlm": ops.cross_entropy, "eager": F.cross_entropy, "compile": F.cross_entropy},
                bytes=2 * M * V * dtype.itemsize,
                forward=1 / 2,
            )


class _Computed(torch.autograd.Function):
    """The logits as a model computes them, without the work: no leaf, in memory of their own."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, memory: list[Tensor]) -> Tensor:
        return memory[0].detach()


class InPlace:
    """Loss and gradient of logits that nobody reads again; they are filled anew before each run, untimed."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
        (logits, self.target), self.function = inputs, function
        self.logits = logits.detach()
        self.memory, self.anchor = self.logits.clone(), torch.zeros((), requires_grad=True)

    def afresh(self) -> None:
        self.memory.copy_(self.logits)

    def __call__(self) -> list[Tensor]:
        logits = _Computed.apply(self.anchor, [self.memory])
        loss = self.function(logits, self.target)
        return [loss, *torch.autograd.grad(loss, logits)]


def in_place_cases(sizes: Sequence[tuple[int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    """The gradient over the logits, as a training step that needs them no more can have it; peers make a new one."""
    for case in cases(sizes):
        ours = partial(ops.cross_entropy, overwrite_logits=True)
        yield replace(
            case, op="cross_entropy in place", functions=case.functions | {"fastlm": ours}, runner=InPlace, forward=0.0
        )


test_cross_entropy = pytest_suite(cases)
