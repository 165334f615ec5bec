"""torch.nn's Transformer layers and stacks: ours beside torch's, with the same weights."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import fastlm
from fastlm import nn, ops, patching
from fastlm.nn import _one_call
from tests.nn.beside_torch import agree, close, pair, results

B, S, T, E, H, F = 3, 7, 5, 32, 4, 48
LAYER = (E, H, F, 0.0)
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [2]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
FLOAT = torch.nn.Transformer.generate_square_subsequent_mask(S)


def batch(length: int, batch_first: bool = True) -> Tensor:
    return torch.randn(B, length, E) if batch_first else torch.randn(length, B, E)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each op ran."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    for name in ("attention", "attention_varlen", "add_layer_norm", "gelu", "dropout", "dropout_add"):
        count(ops, name)
    count(_one_call, "transformer_block")
    return counts


# --- layers ----------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "callable": torch.tanh, "module": torch.nn.GELU(), "tanh": torch.nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_encoder_layer(norm_first: bool, activation: str, batch_first: bool, bias: bool, calls: dict[str, int]) -> None:
    options = {"activation": ACTIVATIONS[activation], "batch_first": batch_first, "norm_first": norm_first}
    layers = pair("TransformerEncoderLayer", *LAYER, bias=bias, **options)
    agree(layers, [batch(S, batch_first)])
    gelu = activation in ("gelu", "module", "tanh")
    if norm_first and gelu and batch_first:
        assert calls == {"transformer_block": 1}
    else:
        assert calls == {"attention": 1, "add_layer_norm": 1 if norm_first else 2, **({"gelu": 1} if gelu else {})}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_decoder_layer(norm_first: bool, activation: str, batch_first: bool, bias: bool, calls: dict[str, int]) -> None:
    options = {"activation": activation, "batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    agree(pair("TransformerDecoderLayer", *LAYER, **options), [batch(T, batch_first), batch(S, batch_first)])
    assert calls["attention"] == 2 and calls["add_layer_norm"] == (2 if norm_first else 3)


def test_layers_unbatched() -> None:
    agree(pair("TransformerEncoderLayer", *LAYER), [torch.randn(S, E)], src_key_padding_mask=PADDING[1])
    agree(pair("TransformerDecoderLayer", *LAYER), [torch.randn(T, E), torch.randn(S, E)])


def masks() -> dict[str, dict[str, Any]]:
    learned = torch.randn(S, S, requires_grad=True)
    return {
        "bool": {"src_mask": CAUSAL},
        "float": {"src_mask": FLOAT},
        "learned": {"src_mask": learned},
        "per head": {"src_mask": torch.rand(B * H, S, S) < 0.3},
        "learned per head": {"src_mask": torch.randn(B * H, S, S, requires_grad=True)},
        "padding": {"src_key_padding_mask": PADDING},
        "float padding": {"src_key_padding_mask": torch.zeros(B, S).masked_fill(PADDING, float("-inf"))},
        "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
        "two dtypes": {"src_mask": learned, "src_key_padding_mask": PADDING},
        "hint": {"src_mask": FLOAT, "is_causal": True},
        "hint and padding": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": True},
    }


@pytest.mark.parametrize("case", masks())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_masks(case: str, training: bool) -> None:
    options = masks()[case]
    layers = [layer.train(training) for layer in pair("TransformerEncoderLayer", *LAYER, batch_first=True)]
    x = batch(S)
    agree(layers, [x], **options)
    if "learned" not in case and "two" not in case:  # torch's fast path of evaluation reads float masks as bool
        with torch.no_grad():
            ours, theirs = (layer(x, **options) for layer in layers)
        close(ours, theirs)


def test_decoder_masks() -> None:
    layers = pair("TransformerDecoderLayer", *LAYER, batch_first=True)
    options = {
        "tgt_mask": CAUSAL[:T, :T], "memory_mask": torch.randn(T, S, requires_grad=True),
        "tgt_key_padding_mask": PADDING[:, :T], "memory_key_padding_mask": PADDING,
    }  # fmt: skip
    agree(layers, [batch(T), batch(S)], **options)
    agree(layers, [batch(T), batch(S)], **options, tgt_is_causal=True)
    agree(layers, [batch(S), batch(S)], memory_mask=FLOAT, memory_is_causal=True)


def test_short_sequences_of_evaluation_take_torchs_fast_path(calls: dict[str, int]) -> None:
    layers = [layer.eval() for layer in pair("TransformerEncoderLayer", *LAYER, batch_first=True)]
    x, long = batch(S), torch.randn(1, 256, E)
    with torch.no_grad():
        assert torch.equal(*(layer(x) for layer in layers)) and not calls
        close(*(layer(long) for layer in layers))
        assert calls.pop("attention") == 1
        with fastlm.use_backend("reference"):
            close(*(layer(x) for layer in layers))
        assert calls.pop("attention") == 1
        with pytest.raises(RuntimeError, match="attn_mask"):  # torch's fast path would see no hint
            layers[0](x, is_causal=True)
    close(*(layer(x).detach() for layer in layers))
    assert calls.pop("attention") == 1
    with torch.no_grad():
        close(layers[0].double()(x.double()), layers[1].double()(x.double()))
        layers[0].norm1.register_forward_hook(lambda *_: seen.append(True))
        seen: list[bool] = []
        layers[0].float()(x)
    assert seen


def test_a_query_without_keys_gives_what_torch_gives_in_training() -> None:
    """Torch's fast path of evaluation gives NaN."""
    padding = PADDING.clone()
    padding[0] = True
    layers = pair("TransformerEncoderLayer", *LAYER, batch_first=True)
    x = batch(S)
    agree(layers, [x], src_key_padding_mask=padding)
    with torch.no_grad():
        expected = layers[1](x, src_key_padding_mask=padding)
        close(layers[0].eval()(x, src_key_padding_mask=padding), expected)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bfloat16_is_as_near_to_float64_as_torchs(name: str, norm_first: bool, activation: str) -> None:
    ours, theirs = pair(name, *LAYER, activation=activation, batch_first=True, norm_first=norm_first)
    inputs = [torch.randn(16, 20, E).bfloat16() for _ in range(1 if "Encoder" in name else 2)]
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    exact = results(copy.deepcopy(theirs).double(), inputs, dtype=torch.float64)
    for i, (a, b, c) in enumerate(zip(results(ours, inputs), results(theirs, inputs), exact, strict=True)):
        limit, ulp = (3 if i else 2), c.abs().max() * 2.0**-8
        if activation == "gelu":  # relu's gradient jumps where rounding changes a sign: no single element says much
            assert (a - c).abs().max() <= limit * (b - c).abs().max() + 2 * ulp
        assert (a - c).square().mean().sqrt() <= limit * (b - c).square().mean().sqrt()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_autocast(name: str, activation: str) -> None:
    ours, theirs = pair(name, *LAYER, activation=activation, batch_first=True)
    inputs = [batch(S), batch(S)][: 1 if "Encoder" in name else 2]
    exact = results(copy.deepcopy(theirs).double(), inputs, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = [results(layer, inputs) for layer in (ours, theirs)]
    for a, b, c in zip(*found, exact, strict=True):
        assert a.dtype is b.dtype
        assert (a - c).square().mean().sqrt() <= 3 * (b - c).square().mean().sqrt()


def whole_block(**options: Any) -> tuple[Any, Any]:
    return pair("TransformerEncoderLayer", *LAYER, "gelu", batch_first=True, norm_first=True, **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_pre_norm_layer_in_one_call(precision: str, calls: dict[str, int]) -> None:
    ours, theirs = whole_block()
    x = torch.randn(16, 20, E)
    causal = {"src_mask": torch.ones(20, 20, dtype=torch.bool).triu(1), "is_causal": True}
    for options in ({}, causal):
        exact = results(copy.deepcopy(theirs).double(), [x], dtype=torch.float64, **options)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found = [results(copy.deepcopy(layer).to(dtype), [x.to(dtype)], **options) for layer in (ours, theirs)]
        for a, b, c in zip(*found, exact, strict=True):
            assert a.dtype is b.dtype
            assert (a - c).square().mean().sqrt() <= 3 * (b - c).square().mean().sqrt() + 1e-6 * c.abs().max()
    assert calls == {"transformer_block": 2}


def test_what_one_call_would_not_do(calls: dict[str, int]) -> None:
    x = batch(S)

    def by_layers(change: Any, **options: Any) -> None:
        calls.clear()
        layers = whole_block()
        for layer in layers:
            change(layer)
        agree(layers, [x], **options)
        assert "transformer_block" not in calls and "attention" in calls

    def nothing(layer: Any) -> None:
        pass

    by_layers(nothing, src_mask=CAUSAL)
    by_layers(nothing, src_key_padding_mask=PADDING)
    by_layers(lambda layer: layer.linear2.register_forward_hook(lambda module, args, out: out + 1))
    by_layers(lambda layer: layer.linear1.weight.requires_grad_(False))
    by_layers(lambda layer: parametrizations.weight_norm(layer.linear2))
    by_layers(lambda layer: setattr(layer.norm1, "eps", 0.1))
    by_layers(lambda layer: setattr(layer.dropout1, "p", 1.0))


def test_dropout_of_a_layer_in_one_call(calls: dict[str, int]) -> None:
    layer = whole_block()[0]
    x = torch.randn(64, 32, E)
    with torch.no_grad():
        for p in (layer.linear2.weight, layer.linear2.bias, layer.self_attn.out_proj.bias):
            p.zero_()
        branch = layer(x) - x
        layer.dropout1.p = layer.dropout2.p = 0.25
        dropped = layer(x) - x
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
    assert abs(kept.float().mean() - 0.75) < 0.01 and calls == {"transformer_block": 2}


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_everything_dropped(norm_first: bool) -> None:
    agree(pair("TransformerEncoderLayer", E, H, F, 1.0, norm_first=norm_first), [batch(S, False)])
    agree(pair("TransformerDecoderLayer", E, H, F, 1.0, norm_first=norm_first), [batch(T, False), batch(S, False)])


def test_dropout_drops_where_torch_does(calls: dict[str, int]) -> None:
    """h = x + dropout1(attention); h + dropout2(linear2(dropout(act(linear1)))), each with its own probability."""
    layer = nn.TransformerEncoderLayer(E, H, E, 0.0, batch_first=True, norm_first=True)
    x = torch.randn(64, 32, E)
    with torch.no_grad():
        for p in (layer.linear2.weight, layer.linear2.bias, layer.self_attn.out_proj.bias):
            p.zero_()
        branch = layer(x) - x
        layer.dropout1.p = 0.25
        dropped = layer(x) - x
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
        assert abs(kept.float().mean() - 0.75) < 0.01  # 65536 draws: six standard deviations

        layer.self_attn.out_proj.weight.zero_()
        layer.linear2.weight.copy_(torch.eye(E))
        branch = layer(x) - x
        layer.dropout.p, layer.dropout2.p = 0.5, 0.2
        dropped = (layer(x) - x)[branch != 0]
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], branch[branch != 0][kept] / 0.4, rtol=1e-4, atol=1e-5)
        assert abs(kept.float().mean() - 0.4) < 0.02
    assert calls["dropout"] == 1 and calls["dropout_add"] == 1 and calls["add_layer_norm"] == 4

    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_dropout_keeps_the_expected_value() -> None:
    layer = nn.TransformerDecoderLayer(E, H, F, 0.1, norm_first=True)
    x, memory = torch.randn(4, 1, E), torch.randn(S, 1, E)
    with torch.no_grad():
        expected = layer.eval()(x, memory)
        many = layer.train()(x.repeat(1, 4000, 1), memory.repeat(1, 4000, 1))
    error, spread = (many.mean(1, True) - expected).abs(), many.std(1, keepdim=True)
    assert (error < 0.1 * spread + 0.02).all()


# --- modules -------------------------------------------------------------------------------------------------------


def test_submodules_are_fastlms_with_torchs_weights() -> None:
    torch.manual_seed(1)
    ours = nn.Transformer(E, H, 2, 2, F, activation=torch.nn.GELU(), batch_first=True)
    torch.manual_seed(1)
    theirs = torch.nn.Transformer(E, H, 2, 2, F, activation=torch.nn.GELU(), batch_first=True)
    assert repr(ours) == repr(theirs)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        kind = getattr(nn, type(b).__name__, None)
        if kind is not None and "activation" not in repr(type(b)).lower():
            assert type(a) is kind or type(b) is torch.nn.GELU, type(a)  # the activation is the caller's


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_the_caller_gives_stays() -> None:
    activation, encoder = torch.nn.ReLU(), torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(*LAYER), 1)
    assert nn.TransformerEncoderLayer(*LAYER, activation=activation).activation is activation
    model = nn.Transformer(E, H, custom_encoder=encoder, num_decoder_layers=1)
    assert model.encoder is encoder and type(encoder.layers[0].linear1) is torch.nn.Linear
    assert type(model.decoder.layers[0].linear1) is nn.Linear


def test_copies_and_files() -> None:
    ours, theirs = pair("TransformerEncoderLayer", *LAYER)
    x = batch(S, False)
    expected = ours(x)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is nn.TransformerEncoderLayer and torch.equal(loaded(x), expected)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    fresh = nn.TransformerEncoderLayer(*LAYER)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_hooks_are_called(norm_first: bool) -> None:
    ours, theirs = pair("TransformerEncoderLayer", *LAYER, batch_first=True, norm_first=norm_first)
    seen: list[list[str]] = [[], []]
    for layer, names in zip((ours, theirs), seen, strict=True):
        for name, module in layer.named_modules():
            if name and name != "self_attn.out_proj":  # torch itself does not call it
                module.register_forward_hook(lambda *_, names=names, name=name: names.append(name))
    agree((ours, theirs), [batch(S)])
    assert sorted(seen[0]) == sorted(seen[1]) and len(seen[0]) == 8


def test_a_hook_that_changes_the_output_counts() -> None:
    layers = pair("TransformerEncoderLayer", *LAYER, batch_first=True)
    for layer in layers:
        layer.norm1.register_forward_hook(lambda module, args, out: 2 * out)
        layer.dropout2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        layer.linear1.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))
    agree(layers, [batch(S)])


def test_changed_parts() -> None:
    layers = pair("TransformerEncoderLayer", *LAYER, batch_first=True)
    for layer in layers:
        torch.manual_seed(4)
        layer.linear1 = torch.nn.Sequential(torch.nn.Linear(E, F), torch.nn.Tanh())
        layer.norm2 = torch.nn.Identity()
        layer.dropout1 = torch.nn.Identity()
        parametrizations.weight_norm(layer.linear2)
        layer.self_attn.in_proj_weight.requires_grad_(False)
    agree(layers, [batch(S)])


def test_a_subclass_that_wants_the_weights_gets_them() -> None:
    class Curious(nn.TransformerEncoderLayer):
        def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
            x, self.weights = self.self_attn(x, x, x, key_padding_mask, True, attn_mask, is_causal=is_causal)
            return self.dropout1(x)

    ours, theirs = Curious(*LAYER, batch_first=True), torch.nn.TransformerEncoderLayer(*LAYER, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    agree((ours, theirs), [batch(S)])
    assert ours.weights.shape == (B, S, S)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_an_instance_of_torchs_class_runs_ours(name: str, calls: dict[str, int]) -> None:
    inputs = [batch(S), batch(T)][: 1 if "Encoder" in name else 2]
    layer = getattr(torch.nn, name)(*LAYER, activation="gelu", batch_first=True)
    stock = results(layer, inputs)
    patching.swap(layer, getattr(nn, name))
    for a, b in zip(results(layer, inputs), stock, strict=True):
        close(a, b)
    assert calls.keys() == {"add_layer_norm", "gelu"}  # its attention is still torch's
    assert patching.restore(layer)
    assert all(map(torch.equal, results(layer, inputs), stock))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(E, H, F, 0.1 if training else 0.0, "gelu", batch_first=True).train(training)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = batch(S).requires_grad_()
    torch.manual_seed(5)
    expected = torch.autograd.grad(layer(x, CAUSAL).square().sum(), x)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.autograd.grad(whole(x, CAUSAL).square().sum(), x), expected)


# --- stacks ----------------------------------------------------------------------------------------------------------


def stacks(norm: bool = True, layers: int = 2, **options: Any) -> tuple[Any, Any]:
    made = []
    for namespace in (nn, torch.nn):
        layer = namespace.TransformerEncoderLayer(*LAYER, **{"batch_first": True, **options})
        made.append(namespace.TransformerEncoder(layer, layers, namespace.LayerNorm(E) if norm else None))
    with torch.no_grad():
        for p in made[0].parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


@pytest.mark.parametrize(
    "mask", [None, CAUSAL, FLOAT, FLOAT.clamp(-1), CAUSAL.T], ids=["no", "bool", "float", "finite", "anti"]
)
@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_encoder(mask: Tensor | None, padding: Tensor | None, mode: str) -> None:
    ours, theirs = (stack.train(mode == "train") for stack in stacks())
    x = batch(S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on nested tensors and masks of two dtypes
        if mode != "no_grad":
            agree((ours, theirs), [x], mask=mask, src_key_padding_mask=padding)
        else:
            with torch.no_grad():
                found, expected = ours(x, mask, padding), theirs(x, mask, padding)
            if mask is None or (padding is None and mask[0, 0] == 0 and mask[0, -1] != -1):
                close(found, expected)
            else:
                close(found, ours.train()(x, mask, padding).detach())


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")
def test_padded_positions_in_evaluation(norm: bool, norm_first: bool, calls: dict[str, int]) -> None:
    """Zeros before the final norm, as from torch's nested tensors; with a gradient their values, as in training."""
    ours, theirs = (stack.eval() for stack in stacks(norm, norm_first=norm_first))
    x = batch(S)
    with torch.no_grad():
        found, expected = ours(x, src_key_padding_mask=PADDING), theirs(x, src_key_padding_mask=PADDING)
        close(found, expected)
        if norm_first:  # torch makes no nested tensor of it
            assert calls.keys() == {"attention", "add_layer_norm"}
            return
        assert calls == {"attention_varlen": 2, "add_layer_norm": 4}
        assert torch.equal(found[PADDING], (ours.norm.bias if norm else torch.zeros(E)).expand(int(PADDING.sum()), E))
        ours.layers[1].norm1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        seen: list[Any] = []
        close(ours(x, src_key_padding_mask=PADDING), found)
        assert seen == [(B, S, E)]  # who listens gets what they would get in training
        left = PADDING.flip(1)
        close(ours(x, src_key_padding_mask=left), theirs(x, src_key_padding_mask=left))
        ours.mask_check = False  # torch would take the first positions for the real ones
        assert (ours(x, src_key_padding_mask=left)[left] == (ours.norm.bias if norm else 0)).all()
    close(ours(x, src_key_padding_mask=PADDING).detach(), theirs(x, src_key_padding_mask=PADDING).detach())


def test_batches_of_padding_alone_and_of_nothing(calls: dict[str, int]) -> None:
    ours = stacks(norm=False)[0].eval()
    with torch.no_grad():
        for shape in ((2, 3), (0, 3), (2, 0)):
            out = ours(torch.randn(*shape, E), src_key_padding_mask=torch.ones(shape, dtype=torch.bool))
            assert torch.equal(out, torch.zeros(*shape, E))
    assert calls["attention_varlen"] == 2


def test_an_instance_of_torchs_stack_runs_ours(calls: dict[str, int]) -> None:
    _, theirs = (stack.eval() for stack in stacks())
    x = batch(S)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = theirs(x, src_key_padding_mask=PADDING)
        for module in theirs.modules():
            kind = getattr(nn, type(module).__name__, type(module))
            if kind is not type(module):
                patching.swap(module, kind)
        close(theirs(x, src_key_padding_mask=PADDING), stock)
    assert calls == {"attention_varlen": 2, "add_layer_norm": 4}


def test_a_causal_mask_is_recognised_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = stacks()
    seen: list[Any] = []
    inner = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: seen.append((k["causal"], k["mask"])) or inner(*a, **k))
    for mask in (CAUSAL, FLOAT):
        ours(batch(S), mask)
    ours(batch(S), FLOAT, is_causal=False)
    assert [causal for causal, _ in seen] == [True] * 4 + [False] * 2
    assert all(mask is None for _, mask in seen[:4])


def test_nested_input() -> None:
    ours, theirs = pair("TransformerEncoderLayer", *LAYER, batch_first=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in (4, 2)])
        a, b = ours.eval()(x), theirs.eval()(x)
    assert a.is_nested and torch.equal(a.to_padded_tensor(0.0), b.to_padded_tensor(0.0))


def test_other_layers_get_torchs_stack() -> None:
    class Plain(torch.nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None):
            assert src_mask is None or src_mask.is_floating_point()  # torch's stack sees to that
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    stack = nn.TransformerEncoder(Plain(*LAYER, batch_first=True), 1)
    assert stack(batch(S), CAUSAL).shape == (B, S, E)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "length"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer(norm_first: bool, batch_first: bool) -> None:
    options = {"activation": "gelu", "batch_first": batch_first, "norm_first": norm_first}
    models = pair("Transformer", E, H, 1, 2, F, 0.0, **options)
    inputs = [batch(S, batch_first), batch(T, batch_first)]
    agree(models, inputs)
    agree(models, inputs, tgt_mask=FLOAT[:T, :T], src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING,
          tgt_key_padding_mask=torch.zeros(B, T).masked_fill(PADDING[:, :T], float("-inf")))  # fmt: skip
    agree(models, inputs, src_mask=CAUSAL, tgt_mask=CAUSAL[:T, :T], tgt_is_causal=True, memory_mask=CAUSAL[:T])


def test_decoder_stack_finds_the_causal_mask(calls: dict[str, int]) -> None:
    made = []
    for namespace in (nn, torch.nn):
        layer = namespace.TransformerDecoderLayer(*LAYER, batch_first=True)
        made.append(namespace.TransformerDecoder(layer, 2, namespace.LayerNorm(E)))
    made[1].load_state_dict(made[0].state_dict())
    agree(made, [batch(S), batch(T)], tgt_mask=CAUSAL)
    assert calls["attention"] == 4


X = torch.ones(B, S, E)
BAD_CALLS = {
    "encoder width": ("TransformerEncoderLayer", (X[..., 1:],), {}),
    "encoder dimensions": ("TransformerEncoderLayer", (X[None],), {}),
    "encoder mask": ("TransformerEncoderLayer", (X,), {"src_mask": torch.zeros(S, S + 1)}),
    "encoder mask dtype": ("TransformerEncoderLayer", (X,), {"src_mask": torch.zeros(S, S, dtype=torch.int64)}),
    "encoder padding": ("TransformerEncoderLayer", (X,), {"src_key_padding_mask": CAUSAL}),
    "hint without mask": ("TransformerEncoderLayer", (X,), {"is_causal": True}),
    "encoder name": ("TransformerEncoderLayer", (X,), {"mask": CAUSAL}),
    "decoder memory": ("TransformerDecoderLayer", (X, X[:1]), {}),
    "decoder mask": ("TransformerDecoderLayer", (X, X), {"memory_mask": torch.zeros(S, S + 1)}),
    "decoder without memory": ("TransformerDecoderLayer", (X,), {}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_what_torch_refuses(case: str) -> None:
    name, arguments, options = BAD_CALLS[case]
    ours, theirs = pair(name, *LAYER, batch_first=True)
    with pytest.raises(Exception) as expected:
        theirs(*arguments, **options)
    with pytest.raises(expected.type):
        ours(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((E, 5), {}), ((E, H), {"activation": "swish"}), ((E, H), {"heads": 2}), ((), {})],
    ids=["heads", "activation", "name", "nothing"],
)
def test_constructors_refuse_what_torch_refuses(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        with pytest.raises(Exception) as expected:
            getattr(torch.nn, name)(*arguments, **options)
        with pytest.raises(expected.type, match=str(expected.value).split("(")[0][:20] or None):
            getattr(nn, name)(*arguments, **options)
