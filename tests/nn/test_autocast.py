"""lower(): parameters in the autocast dtype, by the shadows an optimizer keeps."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastlm import optim
from fastlm._shadow import find
from fastlm.nn import functional as F
from fastlm.nn._autocast import lower, lower_values
from tests.ops.harness import BACKENDS, on

BF16 = torch.bfloat16


def trained(**options: object) -> tuple[nn.Parameter, optim.AdamW]:
    """A parameter after one step."""
    param = nn.Parameter(torch.randn(40, 30))
    optimizer = optim.AdamW([param], 1e-2, shadow_dtype=BF16, **options)  # type: ignore[arg-type]
    param.grad = torch.randn_like(param)
    optimizer.step()
    return param, optimizer


def address(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.data_ptr()


def test_without_a_shadow_it_is_a_cast() -> None:
    x = torch.randn(3, requires_grad=True)
    assert lower(None, BF16) is None and lower(x, None) is x and lower(x, torch.float32) is x
    assert lower(torch.ones(2).double(), BF16).dtype is torch.float64  # type: ignore[union-attr]
    assert lower(torch.ones(2, dtype=torch.int64), BF16).dtype is torch.int64  # type: ignore[union-attr]
    low = lower(x, BF16)
    assert low is not None and low.dtype is BF16
    low.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))  # type: ignore[arg-type]
    assert not lower_values(x, BF16).requires_grad and not lower_values(x, None).requires_grad  # type: ignore[union-attr]


def test_after_a_step_the_copy_is_at_hand() -> None:
    param, optimizer = trained()
    for _ in range(2):
        low, values = lower(param, BF16), lower_values(param, BF16)
        assert low is not None and values is not None and low.requires_grad and not values.requires_grad
        assert torch.equal(low, param.to(BF16)) and torch.equal(values, low)
        assert address(low) == address(values) == address(lower_values(param, BF16))  # nothing was cast
        assert address(lower(param, torch.float16)) != address(low)
        dy = torch.randn(40, 30).to(BF16)
        (grad,) = torch.autograd.grad(low, param, dy)
        assert grad.dtype is torch.float32 and torch.equal(grad, dy.float())
        with torch.no_grad():
            assert address(lower(param, BF16)) == address(values)
        param.grad = torch.randn_like(param)
        optimizer.step()


def load(param: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = param
    module.load_state_dict({"weight": torch.ones_like(param)})


def write(param: nn.Parameter) -> None:
    param.data = torch.randn(40, 30)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "load_state_dict": load, "init": nn.init.ones_, "data": write, "detach": lambda p: p.detach().mul_(2),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_others_is_noticed(change: str) -> None:
    param, optimizer = trained()
    copied = address(lower_values(param, BF16))
    CHANGES[change](param)
    assert torch.equal(lower(param, BF16), param.to(BF16))  # type: ignore[arg-type]
    assert address(lower_values(param, BF16)) != copied
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert torch.equal(lower(param, BF16), param.to(BF16))  # type: ignore[arg-type]
    assert address(lower_values(param, BF16)) == copied


@pytest.mark.parametrize("left_out", [True, False])
def test_a_step_that_may_be_left_out(left_out: bool) -> None:
    """A copy that was out of date is written whether or not the step was."""
    for stale in (True, False):
        param, optimizer = trained()
        if stale:
            nn.init.ones_(param)
        optimizer.found_inf = torch.tensor(float(left_out))  # type: ignore[attr-defined]
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before) == left_out
        assert torch.equal(lower(param, BF16), param.to(BF16))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", sorted({b.partition("-")[0] for b in BACKENDS}))
def test_another_step_before_backward_is_an_error(backend: str) -> None:
    """As when the parameter itself was saved: never gradients of weights that are no more."""
    param, optimizer = trained()
    loss = (lower(param, BF16) ** 2).sum()  # type: ignore[operator]
    with on(backend):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_belong_to_the_optimizer() -> None:
    param, optimizer = trained()
    saved = optimizer.state_dict()
    assert not [k for k in saved["state"][0] if "shadow" in k]
    twin = copy.deepcopy(param)
    low = lower(twin, BF16)
    assert torch.equal(low, twin.to(BF16)) and address(low) != address(lower(param, BF16))  # type: ignore[arg-type]
    del optimizer
    gc.collect()
    assert find(param, BF16) is None
    for wrong in (torch.float32, torch.int8):
        with pytest.raises(ValueError, match="shadow_dtype must be"):
            optim.AdamW([param], shadow_dtype=wrong)


def test_traced_and_transformed_code_casts() -> None:
    param, optimizer = trained()
    assert torch.equal(torch.func.grad(lambda x: (lower(param, BF16) * x).sum())(torch.ones(40, 30)), param.to(BF16))

    def loss() -> Tensor:
        return lower(param, BF16).float().square().sum()  # type: ignore[union-attr]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), loss())
    optimizer.step()
    assert torch.equal(compiled(), loss())


def test_16_bit_parameters_have_none() -> None:
    params = [nn.Parameter(torch.randn(9).to(BF16)), nn.Parameter(torch.randn(9))]
    optimizer = optim.Adam(params, shadow_dtype=torch.float16)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(lower(params[1], torch.float16), params[1].half())  # type: ignore[arg-type]
    assert lower(params[0], BF16) is params[0]


def test_models_tell_their_shapes_on_the_meta_device() -> None:
    """torch.is_autocast_enabled raises there."""
    x, weight = torch.zeros(6, 8, device="meta"), torch.zeros(5, 8, device="meta")
    targets = torch.zeros(6, dtype=torch.int64, device="meta")
    assert F.linear(x, weight).shape == (6, 5)
    assert F.cross_entropy(x, targets).shape == () and F.linear_cross_entropy(x, weight, targets).shape == ()
    assert F.scaled_dot_product_attention(x, x, x).shape == (6, 8)
