"""Where dropout gets its randomness from."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def draw_seed(dropout: float, device: torch.device) -> Tensor | None:
    """The seed (1,) int64 of one call's dropout, from torch's default generator; None where nothing is dropped.

    Raises:
        ValueError: dropout is no probability below 1.
    """
    check_dropout(dropout)
    return torch.randint(2**63 - 1, (1,), device=device) if dropout > 0.0 else None
