from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import embedding

NARROW = {"_forward": 8, "_pieces": 8, "_rows": 16}
"""Ids, keys, order and starts, which the gradient's programs read for a few rows at a time."""


def cases() -> Iterator[Case]:
    ids = meta(32768, dtype=torch.int64)
    for name, v, n in (("bfloat16", 128256, 4096), ("float32", 50257, 1000)):
        weight, dy = (meta(m, n, dtype=DTYPES[name]) for m in (v, 32768))
        yield Case(
            name,
            lambda w=weight, dy=dy, v=v: (embedding.forward(ids, w), embedding.backward(dy, ids, v, -1)),
            narrow=NARROW,
        )
