"""SelfAttention and its cache beside the formula."""

from __future__ import annotations

import pytest
import torch

from fastlm import nn
from fastlm.nn import KVCache, SelfAttention

B, S, E, H = 2, 6, 16, 4


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
