"""The head's gradient in the half types leans to no side: what all rows share is not lost in roundings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm import native, ops
from fastlm.native import linear_cross_entropy as module


@pytest.mark.skipif(native.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_parts_of_many_classes_move_the_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over rows of dhidden, which random roundings leave as it is, is as near to float64's as eager's."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 1)  # slices of LEAST_CLASSES
    hidden, weight = torch.randn(256, 16).to(dtype), (0.02 * torch.randn(16384, 16)).to(dtype)
    target = torch.randint(16384, (256,))
    assert module.two_passes(hidden, weight)

    def gradient(loss: object, hidden: Tensor) -> Tensor:
        x = hidden.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0].double().sum(0)  # type: ignore[operator]

    def eager(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((x @ weight.to(x.dtype).t()).to(wide(x)), target)

    def wide(x: Tensor) -> torch.dtype:
        return torch.float64 if x.dtype is torch.float64 else torch.float32

    truth = gradient(eager, hidden.double())
    stock = (gradient(eager, hidden) - truth).norm()
    ours = (gradient(lambda x: ops.linear_cross_entropy(x, weight, target, backend="cpu"), hidden) - truth).norm()
    assert ours <= 1.5 * stock, f"{ours / stock:.2f} times eager's error"
