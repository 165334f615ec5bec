"""The projections of a transformers model: torch's Linear and transformers' Conv1D, whose weight is (in, out).

ops.linear replaces one product, dy^T x in bfloat16. From 2048 rows on it is the faster one (1.4 to 1.65 times on two
cores with AMX, a layer's forward and backward 1.1 to 1.2 times), at 512 the slower one; below, and where the weight
gets no gradient, the layer runs what it ran before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm.nn import functional as F
from fastlm.patching import Report, obstacle, swap, swapped

_ROWS, _PRODUCTS = 2048, 1 << 30


def _pays(x: Tensor, weight: Tensor) -> bool:
    if not weight.requires_grad or not torch.is_grad_enabled() or weight.dim() != 2 or not x.is_cpu:
        return False
    products = x.shape[:-1].numel() * weight.numel()
    return products >= _PRODUCTS and products >= _ROWS * weight.numel()


class Linear(nn.Linear):
    """torch.nn.Linear over ops.linear where that is the faster one."""

    def forward(self, input: Tensor) -> Tensor:
        if _pays(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        return super().forward(input)


class Conv1D:
    """What transformers.pytorch_utils.Conv1D gets: the same with the parameter's transpose."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if _pays(x, self.weight):
            return F.linear(x, self.weight.t(), self.bias)
        result: Tensor = super().forward(x)  # type: ignore[misc]
        return result


def swap_linears(name: str, module: nn.Module, part: str, report: Report) -> None:
    """Swaps every Linear and Conv1D in `module`, which is called `name` in the model, and reports them under `part`."""
    from transformers.pytorch_utils import Conv1D as Stock

    layers: dict[type, type] = {nn.Linear: Linear, Stock: Conv1D}
    for inner, candidate in module.named_modules(prefix=name):
        layer = layers.get(type(candidate))
        if layer is None or swapped(candidate) is not None:
            continue
        reason = obstacle(candidate)
        if reason is not None:
            report.leave(inner, type(candidate).__name__, part, reason)
        else:
            swap(candidate, layer)
            report.replace(inner, type(candidate).__name__, part, "ops.linear", "long products in bfloat16")
