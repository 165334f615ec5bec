"""MultiheadAttention beside torch's; SelfAttention and its cache beside the formula."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from fastlm import nn, ops
from fastlm.nn import KVCache, SelfAttention

B, S, T, E, H = 2, 6, 7, 16, 4


def pair(**options: object) -> tuple[nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    ours, theirs = nn.MultiheadAttention(E, H, **options), torch.nn.MultiheadAttention(E, H, **options)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def agree(modules, inputs: list[Tensor], roles: tuple[int, int, int] = (0, 1, 2), **options: object) -> None:
    """Outputs and all gradients; roles say which input is query, key and value, so that they can be one tensor."""
    results = []
    for module in modules:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's on masks of two dtypes
            out, weights = module(*(leaves[i] for i in roles), need_weights=False, **options)
        assert weights is None
        wanted = [*leaves, *module.parameters()]
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        results.append([out, *torch.autograd.grad(out, wanted, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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
    "float": {"attn_mask": torch.randn(S, T)},
    "per head": {"attn_mask": torch.rand(B * H, S, T) < 0.3},
    "float per head": {"attn_mask": torch.randn(B * H, S, T)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(B, T).masked_fill(PADDING, float("-inf"))},
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


# --- SelfAttention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_self_attention_is_the_formula(kv_heads: int) -> None:
    layer, x = SelfAttention(E, H, kv_heads), torch.randn(B, S, E)
    D = E // H
    q, k, v = layer.qkv(x).split((H * D, kv_heads * D, kv_heads * D), -1)
    q, k, v = (t.view(B, S, -1, D).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(H // kv_heads, 1) for t in (k, v))
    scores = (q @ k.mT / D**0.5).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    expected = layer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, E))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("pieces", [(6,), (1, 1, 1, 1, 1, 1), (4, 1, 1), (2, 3, 1)], ids=str)
def test_cache_in_pieces_equals_all_at_once(pieces: tuple[int, ...]) -> None:
    layer, x, rope = SelfAttention(E, H, 2), torch.randn(B, S, E), nn.RotaryEmbedding(E // H)
    cache, outputs, start = KVCache(8), [], 0
    with torch.no_grad():
        for piece in pieces:
            outputs.append(layer(x[:, start : start + piece], rope(piece, start), cache))
            start += piece
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x, rope(S)))
    assert cache.length == S


def test_cache_refuses_more_than_it_holds() -> None:
    cache = KVCache(4)
    cache.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="holds 4 positions, got 2 more after 3"):
        cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((16, 3), "width must be a positive multiple of heads, got width=16, heads=3"),
        ((16, 4, 3), "kv_heads must divide heads, got kv_heads=3, heads=4"),
        ((16, 4, 4, True, 1.5), r"dropout must lie in \[0, 1\], got 1.5"),
    ],
)
def test_self_attention_refuses(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SelfAttention(*arguments)
