"""CrossEntropyLoss and LinearCrossEntropyLoss: torch's layers with our forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.nn import functional as F


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, run by fastlm.ops.cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class _LinearCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """The constructor of torch 2.13's LinearCrossEntropyLoss, for older torch."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction, label_smoothing=label_smoothing)
        self.ignore_index = ignore_index  # type: ignore[assignment]
        self.in_features, self.num_classes, self.out_features = in_features, num_classes, out_features
        self.options = options
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
