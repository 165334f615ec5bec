"""EncoderBlock beside torch.nn.TransformerEncoderLayer, and what padding may not change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastlm.nn import EncoderBlock


def twin(block: EncoderBlock, activation: str) -> torch.nn.TransformerEncoderLayer:
    """torch's layer with the block's weights."""
    attention, mlp = block.attention, block.mlp
    width = attention.out.in_features
    layer = torch.nn.TransformerEncoderLayer(
        width, attention.heads, mlp.up.out_features, 0.0, activation, block.norm1.eps, True, block.pre_norm
    )
    layer.load_state_dict({
        "self_attn.in_proj_weight": attention.qkv.weight, "self_attn.in_proj_bias": attention.qkv.bias,
        "self_attn.out_proj.weight": attention.out.weight, "self_attn.out_proj.bias": attention.out.bias,
        "linear1.weight": mlp.up.weight, "linear1.bias": mlp.up.bias,
        "linear2.weight": mlp.down.weight, "linear2.bias": mlp.down.bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    })  # fmt: skip
    return layer


def randomised(**options: object) -> EncoderBlock:
    block = EncoderBlock(32, 4, 48, **options)  # type: ignore[arg-type]
    for p in block.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return block


def same(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> None:
    assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_numbers_and_gradients_of_torchs_layer(activation: str, padded: bool, pre_norm: bool) -> None:
    block = randomised(activation=activation, norm_eps=1e-6, pre_norm=pre_norm)
    layer = twin(block, activation)
    x, dy = torch.randn(3, 11, 32), torch.randn(3, 11, 32)
    mask = torch.arange(11) < torch.tensor([[11], [6], [1]]) if padded else None
    if mask is not None:
        dy = dy * mask[..., None]
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, theirs = block(left, mask), layer(right, src_key_padding_mask=None if mask is None else ~mask)
    mine.backward(dy)
    theirs.backward(dy)
    real = slice(None) if mask is None else mask
    same(mine[real], theirs[real])
    same(left.grad, right.grad)
    for name, p in layer.named_parameters():
        own = {
            "self_attn.in_proj_weight": block.attention.qkv.weight, "self_attn.in_proj_bias": block.attention.qkv.bias,
            "self_attn.out_proj.weight": block.attention.out.weight, "linear1.weight": block.mlp.up.weight,
            "linear2.weight": block.mlp.down.weight, "norm1.weight": block.norm1.weight,
            "norm2.bias": block.norm2.bias,
        }.get(name)  # fmt: skip
        if own is not None:
            same(own.grad, p.grad)


def test_a_row_does_not_depend_on_its_padding() -> None:
    block, x = randomised().eval(), torch.randn(1, 7, 32)
    alone = block(x)
    for filler in (torch.randn(1, 4, 32), torch.full((1, 4, 32), 1e4)):
        padded = block(torch.cat([x, filler], 1), torch.arange(11)[None] < 7)
        torch.testing.assert_close(padded[:, :7], alone, rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_alone_gives_no_nan() -> None:
    block = randomised(dropout=0.1)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = block(x, torch.tensor([[True] * 5, [False] * 5]))
    y.backward(torch.randn_like(y))
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_dropout_is_of_training_and_has_two_rates() -> None:
    block, x = randomised(dropout=0.5, attention_dropout=0.0), torch.randn(2, 5, 32)
    assert block.attention.dropout == 0.0 and EncoderBlock(32, 4, dropout=0.5).attention.dropout == 0.5
    assert not torch.equal(block(x), block(x))
    plain = copy.deepcopy(block).eval()
    assert torch.equal(plain(x), plain(x))


def test_under_autocast_the_residual_stream_stays_float32() -> None:
    block, x = randomised(), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, block(x), rtol=0, atol=0.15)
