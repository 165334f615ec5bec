from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.ahead_of_time import DTYPES, Case, meta
from fastlm.kernels import kl_div

NARROW = {"_forward": 6, "_join": 6, "_backward": 12}
"""Statistics and losses of rows."""


def both(x: Tensor, reverse: bool) -> None:
    loss, stats = kl_div.forward(x, x, None, 2.0, "batchmean", reverse)
    kl_div.backward(loss, x, x, None, stats, 2.0, "batchmean", reverse)


def cases() -> Iterator[Case]:
    for name in ("bfloat16", "float32"):
        x = meta(4096, 128256, dtype=DTYPES[name])
        yield Case(f"128256 {name}", lambda x=x: both(x, False), narrow=NARROW)
    x = meta(8192, 1000)  # divisible by 8, not by 16
    yield Case("reverse 1000 bfloat16", lambda: both(x, True), narrow=NARROW)
