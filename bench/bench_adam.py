"""AdamW steps, with clipping for the small model, against torch's fused and default ones.

bfloat16 parameters: fastlm keeps float32 moments (22 bytes an element), torch bfloat16 ones (14).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Case, Run, pytest_suite
from fastlm import optim

GPT = [(65, 128), (64, 128), *[(128,), (384, 128), (128, 128), (128,), (512, 128), (128, 512)] * 4, (128,)]
SHAPES = {"small GPT": GPT, "47M in 100": [(470_000,)] * 100, "124M in 100": [(1_240_000,)] * 100}


def fastlm_step(params: list[nn.Parameter], clip: bool) -> Run:
    return optim.AdamW(params, 1e-4, max_norm=1.0 if clip else None, capturable=params[0].is_cuda).step


def torch_step(params: list[nn.Parameter], clip: bool, *, fused: bool | None = None) -> Run:
    optimizer = torch.optim.AdamW(params, 1e-4, fused=fused, capturable=params[0].is_cuda)

    def step() -> None:
        if clip:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, clip: bool) -> list[Any]:
    return [clip, *[(torch.randn(shape) * 0.02).to(dtype) for shape in shapes]]


def stepping(function: Callable[..., Run], inputs: Sequence[Any]) -> Run:
    """Own parameters and gradients for each provider, because a step changes them."""
    clip, *tensors = inputs
    params = [nn.Parameter(t.clone()) for t in tensors]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    step = function(params, clip)

    def run() -> list[Tensor]:
        step()
        return [p.detach() for p in params]

    return run


def cases(sizes: Mapping[str, Sequence[tuple[int, ...]]] = MappingProxyType(SHAPES)) -> Iterator[Case]:
    functions = {
        "fastlm": fastlm_step,
        "torch fused": lambda params, clip: torch_step(params, clip, fused=True),
        "torch": torch_step,
    }
    for name, shapes in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            clip, count = name == "small GPT", sum(torch.Size(s).numel() for s in shapes)
            moved = count * (16 + (4 if clip else 3) * dtype.itemsize)
            yield Case(
                "adam",
                f"{name}{' clipped' if clip else ''}",
                dtype,
                lambda shapes=shapes, dtype=dtype, clip=clip: make(shapes, dtype, clip),
                functions if clip else {k: v for k, v in functions.items() if k != "torch"},
                bytes=moved,
                runner=stepping,
            )


test_adam = pytest_suite(cases)
