"""Dropout: torch's layer with our forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.nn import functional as F


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout, run by fastlm.ops.dropout on the CPU: vectorised, and without a mask in memory."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
