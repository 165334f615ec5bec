from __future__ import annotations

from collections.abc import Iterator

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import softmax


def cases() -> Iterator[Case]:
    for n, dtypes in (
        (64, ["bfloat16"]),
        (4096, ["bfloat16", "float32"]),
        (32768, ["bfloat16"]),
        (131072, ["bfloat16"]),
    ):
        for name in dtypes:
            x = meta(8192, n, dtype=DTYPES[name])
            yield Case(f"{n} {name}", lambda x=x: (softmax.forward(x, False), softmax.backward(x, x, False)))
    x = meta(8192, 1000)  # divisible by 8, not by 16
    yield Case("log 1000 bfloat16", lambda: (softmax.forward(x, True), softmax.backward(x, x, True)))
