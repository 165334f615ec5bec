"""patch() on whole models: the same outputs, losses and gradients, and the same model afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm import native
from fastlm.nn import _one_call
from fastlm.patching import Report
from tests.patching.zoo import MODELS, WIDTH, Calls, SwiGLU, build, inputs


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32, autocast: bool = False) -> dict[str, Tensor]:
    """Loss, logits and every gradient of the loss and of the logits under a random upstream gradient."""
    data, targets = inputs(name)
    if data.is_floating_point():
        data = data.to(dtype)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss, logits = model(data, targets)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (loss.double() + (logits * upstream.to(logits.dtype)).double().sum()).backward()
    found = {"loss": loss.detach(), "logits": logits.detach()}
    return found | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    scale = float(expected.abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / scale


def identity(model: nn.Module) -> list[tuple[Any, ...]]:
    """What must not change: objects, their order and names, and what is written on them."""
    tensors = [(name, id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()]
    modules = [(name, id(m), m.training, repr(type(m).__name__)) for name, m in model.named_modules()]
    return [*tensors, *modules]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_in_float32(name: str, training: bool) -> None:
    model = build(name).train(training)
    stock, before = run(model, name), identity(model)
    classes = [type(m) for m in model.modules()]
    report = fastlm.patch(model)
    assert report.replaced and identity(model) == before
    patched = run(model, name)
    assert patched.keys() == stock.keys()
    for key, expected in stock.items():
        assert patched[key].dtype is expected.dtype and patched[key].shape == expected.shape, key
        assert error(patched[key], expected) <= 1e-5, key
    again = run(model, name)
    assert all(torch.equal(again[key], value) for key, value in patched.items())
    fastlm.unpatch(model)
    assert [type(m) for m in model.modules()] == classes and identity(model) == before
    assert not any(key.startswith("_fastlm") for m in model.modules() for key in m.__dict__)
    for key, value in run(model, name).items():
        assert torch.equal(value, stock[key]), key


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_no_less_exact_than_stock(name: str, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = build(name).to(dtype)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})  # no error of the weights' own
    exact = build(name).double()
    exact.load_state_dict(model.state_dict())
    expected = run(exact, name, torch.float64)
    stock = run(model, name, dtype, autocast)
    fastlm.patch(model)
    patched = run(model, name, dtype, autocast)
    for key, value in expected.items():
        assert patched[key].dtype is stock[key].dtype, key
        few = 2.0**-8 if key in ("loss", "logits") else 2.0**-7
        assert error(patched[key], value) <= (2 if key in ("loss", "logits") else 3) * error(stock[key], value) + few, (
            key
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of torch's own encoder
@pytest.mark.parametrize("name", MODELS)
def test_without_gradients(name: str) -> None:
    """The evaluation in which torch's encoder takes its fast path."""
    model = build(name).eval()
    with torch.no_grad():
        stock = model(*inputs(name))
        fastlm.patch(model)
        for found, expected in zip(model(*inputs(name)), stock, strict=True):
            assert error(found, expected) <= 1e-5


def test_the_report_says_what_was_replaced_and_what_was_left(capsys: pytest.CaptureFixture[str]) -> None:
    report = fastlm.patch(build("vit"))
    assert isinstance(report, Report) and capsys.readouterr().out == f"{report}\n"
    assert {(e.part, e.kind, e.by) for e in report.replaced} == {
        ("norm", "LayerNorm", "nn.LayerNorm"), ("attention", "MultiheadAttention", "nn.MultiheadAttention"),
        ("mlp", "GELU", "nn.GELU"), ("loss", "CrossEntropyLoss", "nn.CrossEntropyLoss"),
    }  # fmt: skip
    (left,) = report.left
    assert (left.name, left.kind, left.reason) == ("stem.1", "ChannelNorm", "its class has its own forward")
    names = [entry.name for entry in report.entries]
    assert len(names) == len(set(names)) == 11 and names == [n for n, _ in build("vit").named_modules() if n in names]


@pytest.mark.parametrize("part", ["attention", "norm", "mlp", "loss"])
def test_a_part_alone_and_the_others_later(part: str) -> None:
    parts = ("attention", "norm", "mlp", "loss")
    model, stock = build("vit"), run(build("vit"), "vit")
    report = fastlm.patch(model, **{p: p == part for p in parts})
    assert {entry.part for entry in report.entries if entry.by} == {part}
    rest = fastlm.patch(model)
    assert {entry.part for entry in rest.replaced} == set(parts) - {part}
    assert {entry.reason for entry in rest.left if entry.part == part} >= {"it is replaced already"}
    for key, value in run(model, "vit").items():
        assert error(value, stock[key]) <= 1e-5, key
    fastlm.unpatch(model)
    assert all(torch.equal(value, stock[key]) for key, value in run(model, "vit").items())


def test_an_optimizer_made_before_trains_the_same_parameters() -> None:
    models = build("llama"), build("llama")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    fastlm.patch(models[1])
    losses: list[list[float]] = [[], []]
    for _ in range(4):
        for model, optimizer, kept in zip(models, optimizers, losses, strict=True):
            kept.append(run(model, "llama")["loss"].item())
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0] - 0.1
    assert models[1].head.weight is models[1].embeddings.tokens.weight


def test_hooks_fire_as_before() -> None:
    def fired(patched: bool) -> list[str]:
        model, calls = build("llama"), []
        for name, module in model.named_modules():
            if module._modules:  # on the leaves too, but after patching: in both orders
                module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))
        if patched:
            fastlm.patch(model)
        for name, module in model.named_modules():
            if not module._modules and not isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(lambda m, i, name=name: calls.append(f"before {name}"))
                module.register_full_backward_hook(lambda m, i, o, name=name: calls.append(f"behind {name}"))
        run(model, "llama")
        return calls

    assert fired(True) == fired(False)


def test_the_model_itself_may_be_the_layer() -> None:
    criterion = nn.CrossEntropyLoss(ignore_index=3)
    assert [entry.name for entry in fastlm.patch(criterion).replaced] == [""]
    assert isinstance(criterion, fastlm.nn.CrossEntropyLoss) and isinstance(criterion, nn.CrossEntropyLoss)
    fastlm.unpatch(criterion)
    assert type(criterion) is nn.CrossEntropyLoss


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
def test_linear_cross_entropy_loss() -> None:
    criterion = nn.LinearCrossEntropyLoss(16, 50)
    x, targets = torch.randn(7, 16, requires_grad=True), torch.randint(0, 50, (7,))
    stock = criterion(x, targets)
    expected = torch.autograd.grad(stock, [x, *criterion.parameters()])
    fastlm.patch(criterion)
    loss = criterion(x, targets)
    for found, want in zip(torch.autograd.grad(loss, [x, *criterion.parameters()]), expected, strict=True):
        assert error(found, want) <= 1e-5
    assert error(loss, stock) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_small_calls_are_torch_s(name: str, as_shipped: None) -> None:
    model = build(name)
    stock = run(model, name)
    fastlm.patch(model)
    for key, value in run(model, name).items():
        assert error(value, stock[key]) <= 1e-5, key


@pytest.mark.parametrize(
    ("layer", "shape", "dtype", "fused"),
    [
        (nn.LayerNorm(64), (512, 8, 64), torch.bfloat16, True),
        (nn.LayerNorm(64), (511, 8, 64), torch.bfloat16, False),
        (nn.LayerNorm(64), (512, 8, 64), torch.float32, False),
        (nn.RMSNorm(64), (64, 64), torch.float32, True),
        (nn.RMSNorm(64), (63, 64), torch.float32, False),
        (nn.GELU(), (2, 64), torch.float32, True),
        (nn.GELU("tanh"), (2, 64), torch.float32, False),
        (nn.GELU("tanh"), (128, 64), torch.bfloat16, True),
    ],
)
def test_what_pays_is_fused(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, fused: bool, as_shipped: None
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    fastlm.patch(layer)
    with Calls() as calls:
        layer(torch.randn(shape, dtype=dtype))
    assert bool(calls.seen) is fused


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH), nn.GELU, SwiGLU])
def test_nested_tensors(make: Callable[[], nn.Module], layout: torch.layout) -> None:
    layer = make()
    if isinstance(layer, nn.RMSNorm) and layout is torch.strided:
        pytest.skip("torch has no such RMSNorm")
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=layout)
    with torch.no_grad():
        stock = layer(x)
        fastlm.patch(layer)
        assert all(torch.equal(a, b) for a, b in zip(layer(x).unbind(), stock.unbind(), strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch itself
def test_under_torch_func() -> None:
    """Gradients of every sample of a batch, which fastlm's ops do not give: those calls are torch's."""
    model, (data, targets) = build("classifier"), inputs("classifier")

    def loss(parameters: dict[str, Tensor], data: Tensor, targets: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (data[None], targets[None]))[0]

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    stock = gradients(parameters, data, targets)
    fastlm.patch(model)
    for name, value in gradients(parameters, data, targets).items():
        assert error(value, stock[name]) <= 1e-5, name


@pytest.mark.parametrize("wrap_first", [True, False])
def test_peft_s_adapters(wrap_first: bool) -> None:
    """LoRA inside the recognised parts, put there before or after."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2", "qkv"], init_lora_weights=False)

    def wrap(model: nn.Module) -> nn.Module:
        torch.manual_seed(4)
        return peft.get_peft_model(model, config)

    model = build("llama")
    stock = run(wrap(build("llama")), "llama")
    if wrap_first:
        model = wrap(model)
    assert "ops.swiglu" in {entry.by for entry in fastlm.patch(model).replaced}
    if not wrap_first:
        model = wrap(model)
    found = run(model, "llama")
    assert found.keys() == stock.keys() and any("lora" in key for key in found)
    assert all(error(found[key], value) <= 1e-5 for key, value in stock.items())
    fastlm.unpatch(model)
    assert all(torch.equal(value, stock[key]) for key, value in run(model, "llama").items())


def test_layers_that_share_a_weight_or_are_one_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.second.weight = self.first.weight
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.second(self.first(x))))

    model, x = Shared(), torch.randn(5, WIDTH)
    upstream = torch.randn(5, WIDTH)
    expected = torch.autograd.grad(model(x), list(model.parameters()), upstream)
    report = fastlm.patch(model)
    assert [entry.name for entry in report.replaced] == ["first", "second"]
    assert model.second.weight is model.first.weight and model.again is model.first
    for found, want in zip(torch.autograd.grad(model(x), list(model.parameters()), upstream), expected, strict=True):
        assert error(found, want) <= 1e-5


def test_a_pre_norm_layer_is_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    x, calls = torch.randn(2, 8, WIDTH), []
    stock = layer(x)
    fastlm.patch(layer)
    run_one = _one_call.run

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return run_one(*args, **options)

    monkeypatch.setattr(_one_call, "run", spy)
    found = layer(x)
    assert error(found, stock) <= 1e-5 and len(calls) == (native.isa() is not None)
