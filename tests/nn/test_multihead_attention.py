"""MultiheadAttention beside torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import nn, ops, patching
from tests.nn import beside_torch
from tests.nn.beside_torch import close, results

B, S, T, E, H = 2, 6, 7, 16, 4


def pair(**options: Any) -> tuple[nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    return beside_torch.pair("MultiheadAttention", E, H, **options)


def agree(modules: Any, inputs: list[Tensor], roles: tuple[int, int, int] = (0, 1, 2), **options: Any) -> None:
    beside_torch.agree(modules, inputs, roles, need_weights=False, **options)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Says after a test whether ops.attention ran."""
    calls: list[bool] = []
    inner = ops.attention

    def spy(*args, **kwargs):
        calls.append(True)
        return inner(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", spy)
    return calls


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("roles", [(0, 0, 0), (0, 1, 1), (0, 1, 2)], ids=["self", "cross", "three"])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs(batch_first: bool, roles: tuple[int, int, int], bias: bool, fused: list[bool]) -> None:
    shape = (lambda n: (B, n, E)) if batch_first else (lambda n: (n, B, E))
    tensors = [torch.randn(shape(n)) for n in (S, T, T)][: max(roles) + 1]
    agree(pair(batch_first=batch_first, bias=bias), tensors, roles)
    assert fused


def test_unbatched_and_other_widths(fused: list[bool]) -> None:
    agree(pair(), [torch.randn(S, E), torch.randn(T, E)], (0, 1, 1))
    agree(pair(kdim=10, vdim=12), [torch.randn(S, B, E), torch.randn(T, B, 10), torch.randn(T, B, 12)])
    assert len(fused) == 2


PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
CAUSAL = torch.ones(S, T, dtype=torch.bool).triu(1)
MASKS = {
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.randn(S, T, requires_grad=True)},
    "per head": {"attn_mask": torch.rand(B * H, S, T) < 0.3},
    "float per head": {"attn_mask": torch.randn(B * H, S, T, requires_grad=True)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(B, T).masked_fill(PADDING, float("-inf"))},
    "learned padding": {"key_padding_mask": torch.randn(B, T, requires_grad=True)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "both, two dtypes": {"attn_mask": torch.randn(S, T), "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_leave_out_where_true(case: str, fused: list[bool]) -> None:
    agree(pair(batch_first=True), [torch.randn(B, S, E), torch.randn(B, T, E)], (0, 1, 1), **MASKS[case])
    assert fused


@pytest.mark.parametrize("padding", [None, PADDING[:, 1:]], ids=["hint", "hint and padding"])
def test_causal_hint(padding: Tensor | None, fused: list[bool]) -> None:
    mask = torch.nn.Transformer.generate_square_subsequent_mask(S)
    agree(pair(batch_first=True), [torch.randn(B, S, E)], (0, 0, 0),
          attn_mask=mask, is_causal=True, key_padding_mask=padding)  # fmt: skip
    assert fused


def test_weights_and_additions_come_from_torch(fused: list[bool]) -> None:
    x = torch.randn(S, B, E)
    ours, theirs = pair()
    for a, b in zip(ours(x, x, x), theirs(x, x, x), strict=True):
        assert torch.equal(a, b)
    agree(pair(add_bias_kv=True), [x], (0, 0, 0))
    agree(pair(add_zero_attn=True), [x], (0, 0, 0))
    assert not fused


def test_dropout_while_training_alone() -> None:
    layer, x = nn.MultiheadAttention(E, H, dropout=0.5), torch.randn(S, B, E)
    first, second = (layer(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], layer(x, x, x)[0])


def test_a_query_without_keys_gives_the_bias_of_the_output(fused: list[bool]) -> None:
    """As torch does in training. With weights, and on its fast path of evaluation, it gives NaN."""
    padding = PADDING.clone()
    padding[0] = True
    layers = pair(batch_first=True)
    agree(layers, [torch.randn(B, S, E), torch.randn(B, T, E)], (0, 1, 1), key_padding_mask=padding)
    x, memory = torch.randn(B, S, E), torch.randn(B, T, E)
    out, _ = layers[0].eval()(x, memory, memory, padding, need_weights=False)
    assert fused and torch.equal(out[0], layers[0].out_proj.bias.expand(S, E))


def test_float_masks_count_in_evaluation() -> None:
    """Torch's fast path reads them as bool."""
    layer, x, mask = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, S, E), torch.randn(S, S)
    expected, _ = layer(x, x, x, attn_mask=mask, need_weights=False)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x, x, x, attn_mask=mask, need_weights=False)[0], expected)


def test_everything_dropped() -> None:
    agree(pair(dropout=1.0), [torch.randn(S, B, E)], (0, 0, 0))


def test_the_hint_reaches_the_kernel_beside_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    inner = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: seen.append(k) or inner(*a, **k))
    layer, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, S, E)
    layer(x, x, x, PADDING[:, :S], False, CAUSAL[:, :S], is_causal=True)
    assert seen[0]["causal"] is True and seen[0]["mask"].shape == (B, 1, 1, S)


@pytest.mark.parametrize("average", [True, False])
def test_weights(average: bool) -> None:
    layers, x = pair(batch_first=True), torch.randn(B, S, E)
    found, expected = (layer(x, x, x, PADDING[:, :S], True, CAUSAL[:, :S], average) for layer in layers)
    assert found[1].shape == ((B, S, S) if average else (B, H, S, S))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_bfloat16_is_as_near_to_float64_as_torchs(cross: bool) -> None:
    ours, theirs = (layer.bfloat16() for layer in pair(batch_first=True))
    inputs = [torch.randn(B, S, E).bfloat16(), torch.randn(B, T, E).bfloat16()][: 1 + cross]
    roles, options = (0, cross, cross), {"need_weights": False}
    exact = results(copy.deepcopy(theirs).double(), inputs, roles, torch.float64, **options)
    found = results(ours, inputs, roles, **options), results(theirs, inputs, roles, **options)
    for i, (a, b, c) in enumerate(zip(*found, exact, strict=True)):
        assert (a - c).abs().max() <= (3 if i else 2) * (b - c).abs().max() + 2.0**-7 * c.abs().max()
        assert (a - c).square().mean().sqrt() <= (3 if i else 2) * (b - c).square().mean().sqrt()


def test_an_instance_of_torchs_class_runs_ours(fused: list[bool]) -> None:
    for options in ({}, {"kdim": 10, "vdim": 12}, {"bias": False}):
        layer = torch.nn.MultiheadAttention(E, H, batch_first=True, **options)
        inputs = [torch.randn(B, S, E), torch.randn(B, T, layer.kdim), torch.randn(B, T, layer.vdim)]
        stock = results(layer, inputs, need_weights=False)
        patching.swap(layer, nn.MultiheadAttention)
        for a, b in zip(results(layer, inputs, need_weights=False), stock, strict=True):
            close(a, b)
        assert patching.restore(layer)
        assert all(map(torch.equal, results(layer, inputs, need_weights=False), stock))
    assert len(fused) == 3


def test_within_torchs_encoder_layer(fused: list[bool]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    x = torch.randn(B, S, E)
    expected = layer(x)
    ours = nn.MultiheadAttention(E, H, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    torch.testing.assert_close(layer(x), expected)
    assert fused


X = torch.ones(B, S, E)
BAD_CALLS = {
    "query width": ((torch.ones(B, S, E + 1), X, X), {}),
    "key width": ((X, torch.ones(B, S, E + 1), X), {}),
    "lengths": ((X, X, X[:, 1:]), {}),
    "batches": ((X, X[:1], X[:1]), {}),
    "dimensions": ((X, X[0], X[0]), {}),
    "4-D": ((X[None], X[None], X[None]), {}),
    "mask shape": ((X, X, X), {"attn_mask": torch.zeros(S, S + 1)}),
    "mask dtype": ((X, X, X), {"attn_mask": torch.zeros(S, S, dtype=torch.int64)}),
    "padding shape": ((X, X, X), {"key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)}),
    "hint without a mask": ((X, X, X), {"is_causal": True}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_what_torch_refuses(case: str) -> None:
    arguments, options = BAD_CALLS[case]
    ours, theirs = pair(batch_first=True)
    with pytest.raises(Exception) as expected:
        theirs(*arguments, need_weights=False, **options)
    with pytest.raises(expected.type):
        ours(*arguments, need_weights=False, **options)
