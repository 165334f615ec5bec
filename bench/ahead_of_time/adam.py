"""Each kernel handles a tensor's last chunk beside the whole ones, with masked accesses as wide as an element, and
reads the tables a number at a time. So how many narrow accesses there may be is said for each case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ahead_of_time import Case, meta
from fastlm.kernels import adam

F32 = torch.float32
SHAPES = [(50257, 768), (768,), (3072, 768), (768, 3072)]


def step(
    dtype: torch.dtype, *, grads: torch.dtype | None = None, amsgrad: bool = False, masters: bool = False,
    stochastic: bool = False, bits: int = 32, scaled: bool = False, weight_decay: float = 0.1,
) -> None:  # fmt: skip
    def like(kind: torch.dtype, shapes: list[Any] = SHAPES) -> list[Tensor]:
        return [meta(*shape, dtype=kind) for shape in shapes]

    blocks = [(-(-torch.Size(shape).numel() // 256),) for shape in SHAPES]
    moments = like(torch.uint8 if bits == 8 else F32)
    absmaxes = like(F32, blocks) if bits == 8 else []
    scalar = meta(dtype=F32) if scaled else None
    prepared = adam.Prepared(
        like(dtype), moments, moments, like(F32, [()] * len(SHAPES)), like(F32) if amsgrad else [],
        like(F32) if masters else [], [1] * len(SHAPES) if stochastic else [], absmaxes, absmaxes,
    )  # fmt: skip
    adam.forward(
        prepared, like(grads or dtype), 1e-3 if scalar is None else scalar, 0.9, 0.999, 1e-8, weight_decay, True, False,
        scalar, scalar,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    bf16, f16 = torch.bfloat16, torch.float16
    small = {"_begin": None, "_total": None}
    for name, narrow, options in (
        ("float32", 39, {"dtype": F32}),
        ("float32 amsgrad", 49, {"dtype": F32, "amsgrad": True, "scaled": True}),
        ("bfloat16", 43, {"dtype": bf16, "scaled": True}),
        ("bfloat16 masters", 51, {"dtype": bf16, "masters": True}),
        ("bfloat16 stochastic", 44, {"dtype": bf16, "stochastic": True, "grads": F32}),
        ("float16 stochastic", 45, {"dtype": f16, "stochastic": True}),
        ("float32 8-bit", 81, {"dtype": F32, "bits": 8}),
        ("bfloat16 8-bit stochastic", 84, {"dtype": bf16, "bits": 8, "stochastic": True}),
    ):
        yield Case(name, lambda options=options: step(**options), narrow={**small, "_step": narrow})
    for name, dtype in (("bfloat16", bf16), ("float32", F32)):
        grads = [meta(*shape, dtype=dtype) for shape in SHAPES]
        yield Case(f"norm {name}", lambda grads=grads: adam.norm(grads), narrow={**small, "_squares": 13})
