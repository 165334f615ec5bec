"""Layers: drop-in where torch has them, refusing what makes no sense, whole under torch.compile."""

from __future__ import annotations

import inspect
import shutil

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from fastlm import nn

TORCH_LAYERS = {
    "LayerNorm": ((8,), {}),
    "Linear": ((8, 5), {}),
    "RMSNorm": ((8,), {"eps": 1e-6}),
    "CrossEntropyLoss": ((), {"label_smoothing": 0.1}),
    "MultiheadAttention": ((16, 4), {"batch_first": True}),
    "TransformerEncoderLayer": ((16, 4, 24), {"batch_first": True}),
    "TransformerDecoderLayer": ((16, 4, 24), {"norm_first": True, "bias": False}),
    "Transformer": ((16, 4, 1, 2, 24), {"activation": "gelu", "batch_first": True}),
    "GELU": (("tanh",), {}),
    "Dropout": ((0.3,), {}),
    "Softmax": ((-1,), {}),
    "LogSoftmax": ((), {"dim": 1}),
    "LinearCrossEntropyLoss": ((8, 5), {"bias": True}),
}
each_torch_layer = pytest.mark.parametrize("name", [n for n in TORCH_LAYERS if hasattr(torch.nn, n)])


@each_torch_layer
def test_constructor_repr_and_state_dict_are_torchs(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    forward = [inspect.signature(c.forward).parameters.values() for c in (ours, theirs)]
    assert [(p.name, p.default) for p in forward[0]] == [(p.name, p.default) for p in forward[1]]
    arguments, options = TORCH_LAYERS[name]
    torch.manual_seed(1)
    a = ours(*arguments, **options)
    torch.manual_seed(1)
    b = theirs(*arguments, **options)
    assert repr(a) == repr(b)
    assert list(a.state_dict()) == list(b.state_dict())
    for left, right in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    a.load_state_dict(b.state_dict())


def same_as_torch(name: str, inputs: list[Tensor], **options: object) -> None:
    arguments, defaults = TORCH_LAYERS[name]
    ours = getattr(nn, name)(*arguments, **{**defaults, **options})
    theirs = getattr(torch.nn, name)(*arguments, **{**defaults, **options})
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        out = layer(*leaves)
        wanted = [t for t in [*leaves, *layer.parameters()] if t.requires_grad]
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        results.append([out, *torch.autograd.grad(out, wanted, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)], ids=str)
def test_norms(shape: tuple[int, ...]) -> None:
    same_as_torch("LayerNorm", [torch.randn(shape)])
    same_as_torch("RMSNorm", [torch.randn(shape)])


def test_linear() -> None:
    same_as_torch("Linear", [torch.randn(2, 3, 8)])
    same_as_torch("Linear", [torch.randn(8)], bias=False)
    x, layer = torch.randn(40, 8), nn.Linear(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = T.linear(x, layer.weight, layer.bias)
    assert y.dtype is torch.bfloat16 and torch.equal(y, expected)
    assert type(y.grad_fn).__name__ == "_LinearBackward"


def test_losses() -> None:
    target = torch.tensor([0, 4, -100, 2])
    same_as_torch("CrossEntropyLoss", [torch.randn(4, 5), target], weight=torch.rand(5))
    same_as_torch("CrossEntropyLoss", [torch.randn(4, 5, 3), torch.randint(5, (4, 3))], reduction="none")
    same_as_torch("CrossEntropyLoss", [torch.randn(4, 5), torch.rand(4, 5).softmax(-1)])


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch below 2.13 has no such layer")
def test_linear_cross_entropy_loss() -> None:
    target = torch.tensor([0, 4, 1, 2])
    same_as_torch("LinearCrossEntropyLoss", [torch.randn(4, 8), target], reduction="sum")
    same_as_torch("LinearCrossEntropyLoss", [torch.randn(4, 8), target], weight=torch.rand(5), ignore_index=1)
    same_as_torch("LinearCrossEntropyLoss", [torch.randn(4, 8), torch.randint(5, (4, 3))], out_features=(3,))


def test_linear_cross_entropy_loss_of_older_torch() -> None:
    """The stand-in builds what torch's own class builds."""
    from fastlm.nn.loss import _LinearCrossEntropyLoss

    torch.manual_seed(1)
    stand_in = _LinearCrossEntropyLoss(8, 5, out_features=(2,), bias=True, weight=torch.ones(5))
    torch.manual_seed(1)
    layer = nn.LinearCrossEntropyLoss(8, 5, out_features=(2,), bias=True, weight=torch.ones(5))
    assert stand_in.state_dict().keys() == layer.state_dict().keys()
    x, target = torch.randn(3, 8), torch.randint(5, (3, 2))
    assert torch.equal(nn.LinearCrossEntropyLoss.forward(stand_in, x, target), layer(x, target))
    with pytest.raises(RuntimeError, match="weight must be"):
        _LinearCrossEntropyLoss(8, 5, weight=torch.ones(4))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        _LinearCrossEntropyLoss(8, 5, label_smoothing=2.0)


def test_a_loss_can_share_the_embedding() -> None:
    embedding, loss = torch.nn.Embedding(5, 8), nn.LinearCrossEntropyLoss(8, 5)
    loss.linear.weight = embedding.weight
    loss(embedding(torch.tensor([1, 2])), torch.tensor([2, 3])).backward()
    assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() > 0


# --- add_norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_add_norm_fuses_and_promotes(kind: str) -> None:
    from fastlm.nn.norm import add_norm
    from fastlm.nn.transformer import make_norm

    norm = make_norm(kind, 16)
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    y, h = add_norm(norm, x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, norm(x + residual))
    y, h = add_norm(norm, x.bfloat16(), residual)
    assert h.dtype is torch.float32
    torch.testing.assert_close(h, x.bfloat16() + residual)
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms', got 'batch'"):
        make_norm("batch", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_norm_drops_elements_of_the_branch(dtype: torch.dtype) -> None:
    """Fused where branch and stream have one dtype, apart where not."""
    from fastlm.nn.norm import add_norm
    from fastlm.nn.transformer import make_norm

    norm = make_norm("rms", 64)
    x, residual = torch.ones(50, 64, dtype=dtype), torch.zeros(50, 64)
    y, h = add_norm(norm, x, residual, 0.25)
    assert 0.7 < float((h != 0).float().mean()) < 0.8
    torch.testing.assert_close(h[h != 0], torch.full_like(h[h != 0], 1 / 0.75), rtol=4e-3, atol=0)
    torch.testing.assert_close(y, norm(h))
    assert bool((add_norm(norm, x, residual, 1.0)[1] == 0).all())


# --- rotary ----------------------------------------------------------------------------------------------------------


def test_rotary_table() -> None:
    rope = nn.RotaryEmbedding(8, base=100.0)
    cos, sin = rope(5, 3)
    angles = torch.outer(torch.arange(3, 8).double(), 100.0 ** (-torch.arange(0, 8, 2).double() / 8))
    assert cos.dtype is torch.float32 and cos.shape == (5, 4)
    torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=1e-7)
    assert not rope.state_dict()


def test_rotary_table_grows_and_keeps_float32() -> None:
    rope = nn.RotaryEmbedding(8).bfloat16()
    short = rope(4)[0].clone()
    long = rope(100)[0]
    assert long.shape == (100, 4) and long.dtype is torch.float32
    assert torch.equal(long[:4], short)


def test_rotary_table_made_in_inference_mode_can_train() -> None:
    block, rope = nn.TransformerBlock(16, 2), nn.RotaryEmbedding(8)
    with torch.inference_mode():
        block(torch.randn(1, 4, 16), rope(4))
    block(torch.randn(1, 4, 16, requires_grad=True), rope(4)).sum().backward()


def test_rotary_scores_depend_on_distance_alone() -> None:
    from fastlm.nn.rotary import rotate

    q, k = torch.randn(8).expand(1, 1, 6, 8), torch.randn(8).expand(1, 1, 6, 8)
    for fraction in (1.0, 0.5):
        a, b = rotate(q, k, *nn.RotaryEmbedding(8, fraction=fraction)(6))
        scores = (a @ b.mT)[0, 0]
        for distance in range(-5, 6):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert torch.equal(a[..., 4:], q[..., 4:])  # the half that is not rotated


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"base": 0.0}, "base must be positive, got 0.0"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"fraction": 0.4}, "positive even number, got 0.4"),
    ],
)
def test_rotary_refuses(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nn.RotaryEmbedding(8, **arguments)


# --- MLP -------------------------------------------------------------------------------------------------------------

FORMULAS = {
    "gelu": T.gelu,
    "gelu_tanh": lambda x: T.gelu(x, approximate="tanh"),
    "relu": T.relu,
    "silu": T.silu,
    "swiglu": lambda x: T.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: T.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(activation: str, bias: bool) -> None:
    mlp = nn.MLP(12, 20, activation, bias)
    assert (mlp.up.bias is not None) == bias == (mlp.down.bias is not None)
    x = torch.randn(2, 3, 12, requires_grad=True)
    plain = mlp.down(FORMULAS[activation](mlp.up(x)))
    upstream = torch.randn(plain.shape)
    wanted = [x, *mlp.parameters()]
    torch.testing.assert_close(mlp(x), plain)
    for a, b in zip(
        torch.autograd.grad(mlp(x), wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gated_mlp_has_as_many_weights_as_a_plain_one() -> None:
    plain, gated = (sum(p.numel() for p in nn.MLP(768, activation=a, bias=False).parameters())
                    for a in ("gelu", "swiglu"))  # fmt: skip
    assert abs(gated / plain - 1) < 0.02


def test_mlp_refuses() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of gelu, gelu_tanh, .*, got 'tanh'"):
        nn.MLP(8, activation="tanh")
    with pytest.raises(ValueError, match="at least 1, got 8 and 0"):
        nn.MLP(8, 0)


# --- block -----------------------------------------------------------------------------------------------------------

STYLES = {
    "gpt2": {"norm": "layer", "activation": "gelu"},
    "llama": {"norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 2},
}


def block_and_inputs(style: str, **options: object) -> tuple[nn.TransformerBlock, Tensor, tuple | None]:
    block = nn.TransformerBlock(32, 4, **{**STYLES[style], **options})
    rope = nn.RotaryEmbedding(8)(10) if style == "llama" else None
    return block, torch.randn(2, 10, 32, requires_grad=True), rope


@pytest.mark.parametrize("style", STYLES)
def test_block_is_causal(style: str) -> None:
    block, x, rope = block_and_inputs(style)
    changed = x.detach().clone()
    changed[:, 6:] = torch.randn(2, 4, 32)
    before, after = block(x, rope), block(changed, rope)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])
    both_ways, _, _ = block_and_inputs(style, causal=False)
    assert not torch.allclose(both_ways(x, rope)[:, :6], both_ways(changed, rope)[:, :6])


@pytest.mark.parametrize("style", STYLES)
def test_block_drops_out_while_training_alone(style: str) -> None:
    block, x, rope = block_and_inputs(style, dropout=0.5)
    assert not torch.equal(block(x, rope), block(x, rope))
    block.eval()
    assert torch.equal(block(x, rope), block(x, rope))


def compiled_equals_eager(style: str, backend: str) -> None:
    torch._dynamo.reset()
    block, x, rope = block_and_inputs(style)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    upstream, wanted = torch.randn(x.shape), [x, *block.parameters()]
    expected, actual = block(x, rope), compiled(x, rope)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("style", STYLES)
def test_block_compiles_into_one_graph(style: str) -> None:
    compiled_equals_eager(style, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_block_compiles_with_inductor() -> None:
    compiled_equals_eager("llama", "inductor")


def test_block_compiles_with_autocast() -> None:
    torch._dynamo.reset()
    block, x, rope = block_and_inputs("llama")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, rope), block(x, rope), rtol=0.05, atol=0.05)


def test_block_in_bfloat16_autocast_keeps_a_float32_stream() -> None:
    block, x, _ = block_and_inputs("gpt2")
    plain = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in block.parameters())
