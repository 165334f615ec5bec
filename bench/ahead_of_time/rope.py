from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import rope


def cases() -> Iterator[Case]:
    for name in ("bfloat16", "float32"):
        dtype = DTYPES[name]
        q, k = (meta(4, 4096, heads, 128, dtype=dtype).transpose(1, 2) for heads in (32, 8))
        table = meta(4096, 64, dtype=torch.float32)
        for pairs, interleaved in (("halves", False), ("interleaved", True)):
            yield Case(
                f"{pairs} {name}",
                lambda q=q, k=k, table=table, interleaved=interleaved: rope.forward(q, k, table, table, interleaved),
            )
    q, table = meta(4, 12, 4096, 80), meta(4, 4096, 16, dtype=torch.float32)
    yield Case("partial bfloat16", lambda: rope.forward(q, None, table, table, False))
