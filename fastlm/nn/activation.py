"""GELU, Softmax and LogSoftmax: torch's layers with our forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.nn import functional as F


class GELU(torch.nn.GELU):
    """torch.nn.GELU, run by fastlm.ops.gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax, run by fastlm.ops.softmax."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax, run by fastlm.ops.softmax."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
