"""Tiles, warps and stages of attention's kernels."""

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


def configuration(
    target: Target, direction: str, width: int, dtype: torch.dtype, precision: str, plain: bool
) -> Config:
    if direction in OVERRIDES:
        return OVERRIDES[direction]
    if target is INTERPRETER:
        return Config(64, 64, 4, 1)
    return Config(64, 64, 4, 2)
