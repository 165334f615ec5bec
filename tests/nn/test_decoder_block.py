"""DecoderBlock beside torch.nn.TransformerDecoderLayer; CrossAttention's rows that share a sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm.nn import CrossAttention, DecoderBlock, KVCache


def randomised(**options: object) -> DecoderBlock:
    block = DecoderBlock(32, 4, 48, **options)  # type: ignore[arg-type]
    for p in block.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return block


def twin(block: DecoderBlock, activation: str) -> torch.nn.TransformerDecoderLayer:
    """torch's layer with the block's weights."""
    layer = torch.nn.TransformerDecoderLayer(32, 4, 48, 0.0, activation, block.norm1.eps, True, block.pre_norm)
    own, cross = block.attention, block.cross
    state = {
        "self_attn.in_proj_weight": own.qkv.weight, "self_attn.in_proj_bias": own.qkv.bias,
        "self_attn.out_proj.weight": own.out.weight, "self_attn.out_proj.bias": own.out.bias,
        "multihead_attn.in_proj_weight": torch.cat((cross.q.weight, cross.kv.weight)),
        "multihead_attn.in_proj_bias": torch.cat((cross.q.bias, cross.kv.bias)),
        "multihead_attn.out_proj.weight": cross.out.weight, "multihead_attn.out_proj.bias": cross.out.bias,
        "linear1.weight": block.mlp.up.weight, "linear1.bias": block.mlp.up.bias,
        "linear2.weight": block.mlp.down.weight, "linear2.bias": block.mlp.down.bias,
    }  # fmt: skip
    norms = {f"norm{i}.{name}": p for i in (1, 2, 3) for name, p in getattr(block, f"norm{i}").named_parameters()}
    layer.load_state_dict(state | norms)
    return layer


def same(x: Tensor | None, y: Tensor | None) -> None:
    assert x is not None and y is not None
    assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_numbers_and_gradients_of_torchs_layer(activation: str, pre_norm: bool) -> None:
    block = randomised(activation=activation, norm_eps=1e-6, pre_norm=pre_norm)
    layer = twin(block, activation)
    x, memory, dy = torch.randn(3, 6, 32), torch.randn(3, 11, 32), torch.randn(3, 6, 32)
    mask = torch.arange(11) < torch.tensor([[11], [6], [1]])
    inputs = [(x.clone().requires_grad_(), memory.clone().requires_grad_()) for _ in range(2)]
    mine = block(inputs[0][0], block.cross.keys_values(inputs[0][1]), mask)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    theirs = layer(*inputs[1], tgt_mask=hidden, memory_key_padding_mask=~mask)
    mine.backward(dy)
    theirs.backward(dy)
    same(mine, theirs)
    for left, right in zip(*inputs, strict=True):
        same(left.grad, right.grad)
    same(block.attention.qkv.weight.grad, layer.self_attn.in_proj_weight.grad)
    same(block.cross.q.weight.grad, layer.multihead_attn.in_proj_weight.grad[:32])
    same(block.cross.kv.weight.grad, layer.multihead_attn.in_proj_weight.grad[32:])
    same(block.mlp.up.weight.grad, layer.linear1.weight.grad)
    for norm in ("norm1", "norm2", "norm3"):
        same(getattr(block, norm).weight.grad, getattr(layer, norm).weight.grad)


@pytest.mark.parametrize("length", [1, 3])
def test_rows_that_share_a_sequence(length: int) -> None:
    """Beams: rows 0 to 3 see the first of two sequences, 4 to 7 the second."""
    layer = CrossAttention(16, 2).eval()
    x, memory, mask = (
        torch.randn(8, length, 16),
        torch.randn(2, 5, 16),
        torch.tensor([[True] * 5, [True] * 2 + [False] * 3]),
    )
    shared = layer(x, *layer.keys_values(memory), mask)
    repeated = layer(x, *layer.keys_values(memory.repeat_interleave(4, 0)), mask.repeat_interleave(4, 0))
    torch.testing.assert_close(shared, repeated)


def test_a_cache_and_its_reordering() -> None:
    block, x = randomised().eval(), torch.randn(3, 6, 32)
    kv = block.cross.keys_values(torch.randn(3, 4, 32))
    cache, rows = KVCache(6), torch.tensor([2, 0, 0])
    cache.reorder(rows)  # nothing there yet
    block(x[:, :4], kv, cache=cache)
    cache.reorder(rows)
    mixed = torch.cat((x[rows, :4], x[:, 4:]), 1)
    torch.testing.assert_close(block(x[:, 4:], kv, cache=cache), block(mixed, kv)[:, 4:])


def test_training_with_dropout_and_bad_arguments() -> None:
    block = randomised(dropout=0.4, attention_dropout=0.0)
    assert block.cross.dropout == 0.0 and DecoderBlock(32, 4, dropout=0.4).cross.dropout == 0.4
    x, kv = torch.randn(2, 5, 32), block.cross.keys_values(torch.randn(2, 3, 32))
    assert not torch.equal(block(x, kv), block(x, kv))
    assert torch.equal(block.eval()(x, kv), block(x, kv))
    with pytest.raises(ValueError, match="width must be a positive multiple of heads, got width=10, heads=3"):
        CrossAttention(10, 3)
    with pytest.raises(ValueError, match="dropout must lie in"):
        CrossAttention(9, 3, 2.0)
