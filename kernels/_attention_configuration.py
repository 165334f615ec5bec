"""Tiles, warps and stages of attention's kernels: by chip, direction and head dim.

The tables were chosen by what the compiler makes of them alone (Triton 3.9.0, ahead of time); no GPU has run them.
D = 128, causal, bfloat16 on sm_90, registers a thread and spilling instructions:

    forward  128 x 128, 8 warps, 2 stages   255, 92: around the loops, for the path of values that are not finite, none
             within those that run (without masks: 240, 0); 64 x 128, 4 warps 255, 368; 3 stages take 224 KB and spill
    keys     64 x 128, 8 warps, 2 stages    255, 0 with the tiles on the diagonal of half the size (62 without);
             64 x 64, 4 warps 163; 128 x 64, 8 warps 329
    queries  128 x 64, 8 warps, 2 stages    235, 0; 128 x 128, 8 warps 210; 64 x 64, 4 warps 10

Options beside causal take registers too: with 128 x 128 documents spill 841 in forward, windows with softcap 400, in
the loops as well; with 128 x 64 they have 90 around the loops and none. D = 64: forward with 4 warps and 128 x 64, so
that two blocks share a multiprocessor and one computes exponentials while the other multiplies (255, 13, none within a
loop that runs); 128 x 128 with 4 warps spills 494, keys of 128 x 128 51.
float32 products take three of tf32 (below); with "ieee", which no tensor core has, every tile spilled 1000 to 15000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm.kernels._launch import INTERPRETER, Target


class Config(NamedTuple):
    m: int
    """Queries of a tile."""
    n: int
    """Keys of a tile."""
    warps: int
    stages: int


OVERRIDES: dict[str, Config] = {}
"""By direction, before the tables: for whoever measures other tiles."""

_Table = dict[str, dict[int, Config]]
"""By direction, then by the largest padded head dim the entry is for."""

_HOPPER: _Table = {
    "forward": {64: Config(128, 64, 4, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 32, 8, 2)},
    "keys": {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 256: Config(32, 32, 8, 2)},
    "queries": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
}
_HOPPER_OPTIONS: _Table = {
    "forward": {64: Config(64, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 1)},
    "keys": {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
    "queries": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 1)},
}
_BLACKWELL: _Table = {
    "forward": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "keys": {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 256: Config(32, 32, 8, 2)},
    "queries": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
}
_AMPERE: _Table = {  # and the fallback: all of it fits the 99 KB of sm_86, sm_89 and sm_120
    "forward": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "keys": {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    "queries": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
}
_AMPERE_OPTIONS = {**_AMPERE, "keys": {**_AMPERE["keys"], 64: Config(32, 64, 4, 2)}}
_FLOAT32: _Table = {
    "forward": {64: Config(64, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "keys": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "queries": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "bias": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
}
_BIAS = {64: Config(64, 64, 8, 1), 128: Config(64, 64, 8, 1), 256: Config(32, 32, 8, 1)}


def configuration(target: Target, direction: str, width: int, dtype: torch.dtype, plain: bool) -> Config:
    """For "forward", "keys" (dK and dV), "queries" (dQ) and "bias".

    Args:
        width: the larger of the two head dims, padded to a power of two.
        plain: no option but causal.
    """
    if direction in OVERRIDES:
        return OVERRIDES[direction]
    if target is INTERPRETER:
        return Config(64, 64, 4, 1)
    if dtype is torch.float32:
        table = _FLOAT32
    elif target.arch == 90:
        table = _HOPPER if plain else _HOPPER_OPTIONS
    elif target.arch in (100, 103):
        table = _BLACKWELL
    else:
        table = _AMPERE if plain else _AMPERE_OPTIONS
    sizes = _BIAS if direction == "bias" and dtype is not torch.float32 else table[direction]
    return next(config for limit, config in sizes.items() if width <= limit)
