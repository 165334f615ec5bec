"""Embedding: torch's layer with our forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.nn import functional as F


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding, run by fastlm.ops.embedding: its gradient is summed in float32, the same bits every time."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
