from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.ahead_of_time import Case, meta
from fastlm.kernels import attention

B, S = 4, 4096
WGMMA = frozenset({"forward", "backward_keys", "backward_queries"})
FORWARD, BACKWARD = WGMMA - {"backward_keys", "backward_queries"}, WGMMA - {"forward"}
NARROW = {
    "forward": 200, "prepare": None, "backward_keys": 40, "backward_queries": 40, "backward_bias": None, "clear": None,
    "document_ranges": None,
}  # fmt: skip
"""lse, delta, ids and lengths; in forward the NaNs that are put back one by one."""
AROUND = {"forward": 100}
"""Spills around the loops, for the path of values that are not finite; none in a loop that runs without those.

Other allowances below are sm_100's, of which no tiles have been looked for but those of the table."""


def case(
    name: str, *, heads: int = 16, kv_heads: int = 16, d: int = 128, dtype: torch.dtype = torch.bfloat16,
    causal: int = 0, mask: tuple[int, ...] | None = None, alibi: bool = False, sinks: bool = False,
    documents: bool = False, varlen: bool = False, left: int = -1, softcap: float = 0.0, dropout: float = 0.0,
    backward: bool = True, wgmma: frozenset[str] = WGMMA, spills: dict[str, int] | None = None,
) -> Case:  # fmt: skip
    b, s = (1, B * S) if varlen else (B, S)
    q, k = meta(b, s, heads, d, dtype=dtype).transpose(1, 2), meta(b, s, kv_heads, d, dtype=dtype).transpose(1, 2)
    ids = meta(b, s, dtype=torch.int32) if documents else None
    cu = meta(B + 1, dtype=torch.int32) if varlen else None
    tensors = (
        None if mask is None else meta(*mask, dtype=dtype), meta(1, dtype=torch.int64) if dropout else None,
        meta(heads, dtype=torch.float32) if sinks else None, meta(heads, dtype=torch.float32) if alibi else None,
        ids, ids, cu, cu,
    )  # fmt: skip
    options = (S, S, causal, left, -1, softcap, d**-0.5, dropout)

    def run() -> Any:
        out, lse = attention.forward(q, k, k, *tensors, *options)
        if backward:
            attention.backward(out, None, q, k, k, *tensors, out, lse, *options, mask is not None)

    return Case(name, run, narrow=NARROW, wgmma=wgmma if backward else wgmma & FORWARD, spills=spills or {})


def cases() -> Iterator[Case]:
    for d in (64, 128):
        yield case(f"D={d}", d=d)
        yield case(f"D={d} causal", d=d, causal=1, spills=AROUND)
    yield case("D=96 causal", d=96, causal=1, spills=AROUND)
    yield case("D=256 causal", d=256, causal=1, wgmma=WGMMA - {"backward_keys"})
    yield case("float16", dtype=torch.float16)
    yield case("float32", dtype=torch.float32, wgmma=frozenset(), spills={"backward_keys": 100, "backward_queries": 25})
    # Its loops reload 4 registers on sm_90; the others are saved around them, once a query head.
    yield case("grouped", kv_heads=2, causal=1, spills={**AROUND, "backward_keys": 440})
    yield case("packed", varlen=True, causal=1, spills={"forward": 30})
    yield case("documents", documents=True, causal=1, spills={"forward": 180, "backward_queries": 45})
    yield case("window, sinks", left=127, causal=1, sinks=True, d=64, heads=64, kv_heads=8,
               spills={"backward_keys": 65})  # fmt: skip
    yield case("softcap, window", left=1023, causal=1, softcap=50.0, spills=AROUND)
    yield case("ALiBi", alibi=True, causal=1, backward=False, spills=AROUND)
    yield case("bias", mask=(1, 16, S, S), d=64)
    yield case("dropout", dropout=0.1, causal=1, d=64)
