from __future__ import annotations

from collections.abc import Iterator

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import gelu


def cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        x = meta(16384, 4096, dtype=dtype)
        yield Case(name, lambda x=x: (gelu.forward(x, False), gelu.backward(x, x, False)))
    x = meta(16384, 4096)
    yield Case("tanh bfloat16", lambda: (gelu.forward(x, True), gelu.backward(x, x, True)))
