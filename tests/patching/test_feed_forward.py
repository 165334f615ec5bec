"""Which feed-forward modules are recognised, and what they do when something about them has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.patching._feed_forward import recognise
from tests.patching.zoo import Calls

WIDTH, HIDDEN = 16, 40


class Gated(nn.Module):
    """gate, up, down; subclasses say what is done with them."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(0.25)
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Functional(Gated):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.drop(self.down(self.up(hidden_states) * F.gelu(self.gate(hidden_states), approximate="tanh")))


class Spread(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        up = self.up(x)
        y = torch.mul(up, F.silu(gate, inplace=True))
        return self.drop(self.down(self.drop(y)))


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inner(x).chunk(2, -1)
        return self.outer(F.silu(gate) * up)


class PackedUpFirst(Packed):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = torch.chunk(self.inner(x), chunks=2, dim=-1)
        return self.outer(up * F.gelu(gate))


class Plain(Gated):
    def __init__(self) -> None:
        super().__init__()
        del self.up

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.gate(x))))


FORMS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "SiLU module": (lambda: Gated(nn.SiLU()), "gated", "ops.swiglu"),
    "GELU module": (lambda: Gated(nn.GELU(approximate="tanh")), "gated", "ops.geglu"),
    "own GELU module": (lambda: Gated(TanhGELU()), "gated", "ops.geglu"),
    "functional": (Functional, "gated", "ops.geglu"),
    "spread over lines": (Spread, "gated", "ops.swiglu"),
    "packed": (Packed, "packed", "ops.swiglu"),
    "packed, up first": (PackedUpFirst, "packed, up first", "ops.geglu"),
    "plain": (Plain, "plain", "ops.gelu"),
}


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)  # of the dropout
    x = x.detach().requires_grad_()
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in module.parameters() if p.requires_grad)], upstream)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.dtype is b.dtype and (a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, expected, strict=True)
    )


def fused(module: nn.Module, x: Tensor, **kwargs: Any) -> bool:
    with Calls() as calls:
        module(x, **kwargs)
    assert calls.seen in ([], ["glu_forward"], ["gelu_forward"])
    return bool(calls.seen)


@pytest.mark.parametrize("form", FORMS)
def test_recognised(form: str) -> None:
    build, shape, by = FORMS[form]
    module, x = build(), torch.randn(3, 5, WIDTH)
    plan = recognise(module)
    assert plan is not None and plan.form == shape and plan.op == by
    expected = results(module, x)
    (entry,) = fastlm.patch(module).entries
    assert (entry.kind, entry.part, entry.by) == (type(module).__name__, "mlp", by)
    assert fused(module, x) and same(results(module, x), expected)
    again = results(copy.deepcopy(module), x)
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), again, strict=True))
    fastlm.unpatch(module)
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), expected, strict=True)) and not fused(module, x)


def gated(forward: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    kind: Any = type("Made", (Gated,), {"forward": forward})
    module = kind(nn.SiLU())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def in_training_alone(self: Any, x: Tensor) -> Tensor:
    return self.down(F.silu(self.gate(x)) * self.up(x)) if self.training else self.down(self.up(x))


def by_shape(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 3:
        x = x.tanh()
    return self.down(F.silu(self.gate(x)) * self.up(x))


def counts(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return self.down(F.silu(self.gate(x)) * self.up(x))


def keeps(self: Any, x: Tensor) -> Tensor:
    self.kept = F.silu(self.gate(x))
    return self.down(self.kept * self.up(x))


def appends(self: Any, x: Tensor) -> Tensor:
    self.log.append(self.gate(x))
    return self.down(F.silu(self.log[-1]) * self.up(x))


OTHERS: dict[str, nn.Module] = {
    "another activation": gated(lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x))),
    "sigmoid": gated(lambda m, x: m.down(m.gate(x).sigmoid() * m.up(x))),
    "one product twice": gated(lambda m, x: m.down(F.silu(m.gate(x)) * m.gate(x))),
    "its own result": gated(lambda m, x: (lambda y: m.down(F.silu(y) * y))(m.gate(x)) + 0 * m.up(x)),
    "a factor": gated(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)) * 2),
    "a factor inside": gated(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x) * m.scale), scale=0.5),
    "a sum in place of the product": gated(lambda m, x: m.down(F.silu(m.gate(x)) + m.up(x))),
    "a residual": gated(lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x))),
    "two activations": gated(lambda m, x: m.down(F.silu(m.gate(x)) * F.silu(m.up(x)))),
    "up of gate": gated(lambda m, x: m.down((lambda g: F.silu(g) * m.down(g))(m.gate(x)))),
    "dropout baked in": gated(lambda m, x: m.down(F.dropout(F.silu(m.gate(x)), 0.5, m.training) * m.up(x))),
    "a pair of results": gated(lambda m, x: (m.down(F.silu(m.gate(x)) * m.up(x)), x)),
    "something beside": gated(lambda m, x: (x.mean(), m.down(F.silu(m.gate(x)) * m.up(x)))[1]),
    "the mode": gated(in_training_alone),
    "the shape": gated(by_shape),
    "values": gated(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)) if x.sum() > 0 else x),
    "weights of its own": gated(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), scale=nn.Parameter(torch.ones(1))),
    "counting": gated(counts, count=0),
    "keeping": gated(keeps),
    "a list": gated(appends, log=[]),
    "two arguments": gated(lambda m, x, y=None: m.down(F.silu(m.gate(x)) * m.up(x))),
}


@pytest.mark.parametrize("what", OTHERS)
def test_not_recognised(what: str) -> None:
    module = OTHERS[what]
    before = dict(module.__dict__)
    assert recognise(module) is None
    assert module.__dict__ == before
    with pytest.raises(ValueError, match="nothing to replace"):
        fastlm.patch(module, norm=False)


class Flag(Gated):
    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.scaled: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if self.scaled:
            x = 2 * x
        return self.down(self.act(self.gate(x)) * self.up(x))


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def change_flag(m: Flag) -> None:
    m.scaled = True


def change_activation(m: Flag) -> None:
    m.act = nn.ReLU()


def hook_activation(m: Flag) -> None:
    m.act.register_forward_hook(lambda module, args, y: 3 * y)


def wrap_activation(m: Flag) -> None:
    m.act.forward = lambda x: x.relu()  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [change_flag, change_activation, hook_activation, wrap_activation])
def test_what_changed_afterwards_sends_the_call_back(change: Callable[[Flag], None]) -> None:
    module, x = Flag(), torch.randn(2, 5, WIDTH)
    stock = copy.deepcopy(module)
    fastlm.patch(module)
    assert fused(module, x)
    change(module)
    change(stock)
    assert not fused(module, x)
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), results(stock, x), strict=True))


def frozen(m: Flag) -> None:
    m.up.requires_grad_(False)


def wrapped(m: Flag) -> None:
    m.gate = Twice(m.gate)  # type: ignore[assignment]


def hooked(m: Flag) -> None:
    m.gate.register_forward_hook(lambda module, args, y: y + 1)
    m.up.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def parametrized(m: Flag) -> None:
    torch.nn.utils.parametrizations.weight_norm(m.down)


@pytest.mark.parametrize("change", [frozen, wrapped, hooked, parametrized])
def test_children_with_weights_may_become_others(change: Callable[[Flag], None]) -> None:
    module, x = Flag(), torch.randn(2, 5, WIDTH)
    stock = copy.deepcopy(module)
    fastlm.patch(module)
    change(module)
    change(stock)
    assert fused(module, x) and same(results(module, x), results(stock, x))


def test_two_dtypes_and_float64() -> None:
    module, x = Flag(), torch.randn(2, 5, WIDTH)
    fastlm.patch(module)
    module.gate.register_forward_hook(lambda m, args, y: y.double())
    module.down.double()
    assert not fused(module, x) and module(x).dtype is torch.float64
    module = Flag().double()
    expected = results(module, x.double())
    fastlm.patch(module)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(results(module, x.double()), expected, strict=True))


def test_by_keyword() -> None:
    module, x = Flag(), torch.randn(2, 5, WIDTH)
    expected = module(x)
    fastlm.patch(module)
    assert torch.equal(module(x=x), expected)
    with pytest.raises(TypeError):
        module()


def test_under_functorch() -> None:
    module, x = Flag(), torch.randn(4, 5, WIDTH)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    expected = gradients(parameters, x)
    fastlm.patch(module)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(parameters, x).items())


def test_an_activation_that_two_share() -> None:
    act = nn.GELU()
    model, x = nn.ModuleList([Gated(act), Gated(act), nn.Sequential(act)]), torch.randn(2, WIDTH)
    expected = [m(x) for m in model]
    report = fastlm.patch(model)
    assert [entry.name for entry in report.replaced if entry.by == "ops.geglu"] == ["0", "1"]
    assert all(torch.allclose(m(x), y, rtol=1e-5, atol=1e-6) for m, y in zip(model, expected, strict=True))
    fastlm.unpatch(model)
    assert all(torch.equal(m(x), y) for m, y in zip(model, expected, strict=True))
