from __future__ import annotations

from collections.abc import Iterator

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import glu


def cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        packed, dy = meta(8192, 2 * 11008, dtype=dtype), meta(8192, 11008, dtype=dtype)
        yield Case(
            f"packed silu {name}",
            lambda x=packed, dy=dy: (glu.forward(x, None, "silu"), glu.backward(dy, x, None, "silu")),
        )
    x = meta(8192, 1000)  # divisible by 8, not by 16
    yield Case("two gelu bfloat16", lambda: (glu.forward(x, x, "gelu"), glu.backward(x, x, x, "gelu")))
