"""fastlm.nn.functional beside torch.nn.functional: signatures, values, dtypes, autocast and what is refused."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from fastlm.nn import functional as F
from tests.ops.harness import BACKWARD, FORWARD, assert_accurate, differentiate

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def agree(ours, theirs, tensors: list[Tensor | None]) -> None:
    """Outputs and gradients within the accuracy rule of what torch gives, which sets the yardstick."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    oracle, oracle_grads = differentiate(theirs, wide)
    eager, eager_grads = differentiate(theirs, tensors)
    actual, grads = differentiate(ours, tensors)
    assert actual[0].dtype is eager[0].dtype and actual[0].shape == eager[0].shape
    assert_accurate("output", actual[0], oracle[0], eager[0], FORWARD)
    for i, (a, o, e) in enumerate(zip(grads, oracle_grads, eager_grads, strict=True)):
        assert a.dtype is e.dtype
        assert_accurate(f"gradient {i}", a, o, e, BACKWARD, ulps=8)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax", "embedding"])
def test_signatures_are_torchs(name: str) -> None:
    ours, theirs = inspect.signature(getattr(F, name)), inspect.signature(getattr(T, name))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


def test_signature_of_attention_is_torchs() -> None:
    """Torch's is a builtin, so its docstring is read."""
    parameters = inspect.signature(F.scaled_dot_product_attention).parameters.values()
    text = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    documented = " ".join(T.scaled_dot_product_attention.__doc__.split("->")[0].split())
    assert documented == f"scaled_dot_product_attention({text})"


# --- norms -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    ("shape", "normalized"),
    [((4, 8), (8,)), ((2, 3, 5, 7), (7,)), ((2, 3, 5, 7), (5, 7)), ((6, 4), (6, 4)), ((0, 8), (8,)), ((9,), (9,))],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...], normalized: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape).to(dtype)
    parameters = [torch.randn(normalized).to(dtype) if affine else None for _ in range(2)]
    agree(lambda x, w, b: F.layer_norm(x, normalized, w, b), lambda x, w, b: T.layer_norm(x, normalized, w, b),
          [x, *parameters])  # fmt: skip


@each_dtype
@pytest.mark.parametrize("normalized", [(7,), (5, 7), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(dtype: torch.dtype, normalized: tuple[int, ...], eps: float | None, affine: bool) -> None:
    x = torch.randn(4, 3, 5, 7).to(dtype)
    weight = torch.randn(normalized).to(dtype) if affine else None
    # None means the epsilon of the dtype torch accumulates in, which the float64 oracle must be told.
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    given = torch.finfo(wide).eps if eps is None else eps
    agree(lambda x, w: F.rms_norm(x, normalized, w, eps), lambda x, w: T.rms_norm(x, normalized, w, given), [x, weight])


@pytest.mark.parametrize("input_dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [*CPU_DTYPES, None], ids=str)
def test_norms_take_and_refuse_the_dtypes_torch_does(input_dtype, weight_dtype, bias_dtype) -> None:
    x, weight = torch.randn(4, 8).to(input_dtype), torch.randn(8).to(weight_dtype)
    bias = None if bias_dtype is None else torch.randn(8).to(bias_dtype)
    same_outcome(lambda module: module.layer_norm(x, (8,), weight, bias))
    if bias is None:
        same_outcome(lambda module: module.rms_norm(x, (8,), weight))


X = torch.ones(4, 8)
BAD_NORMS = {
    "other shape": (X, (7,)),
    "weight of another shape": (X, (8,), torch.ones(7)),
    "nothing to normalise": (X, ()),
    "integer for a shape": (X, 8),
    "scalar": (torch.tensor(1.0), (1,)),
    "flat weight": (X, (4, 8), torch.ones(8)),
    "not a tensor": ([1.0, 2.0], (2,)),
    "integers": (X.long(), (8,)),
    "other device": (X, (8,), torch.ones(8, device="meta")),
    "longer than the input": (X, (1, 4, 8)),
}


def same_outcome(call) -> None:
    """Torch and ours return one dtype and shape, or raise one type of exception."""
    outcomes = []
    for module in (T, F):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = call(module)
                outcomes.append((result.dtype, result.shape))
            except Exception as error:
                outcomes.append(type(error))
    assert outcomes[0] == outcomes[1], f"torch: {outcomes[0]}, fastlm: {outcomes[1]}"


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("case", BAD_NORMS)
def test_norms_refuse_what_torch_refuses(name: str, case: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  (every one of these is wrong; which exception, torch says below)
        getattr(T, name)(*BAD_NORMS[case])
    same_outcome(lambda module: getattr(module, name)(*BAD_NORMS[case]))


@pytest.mark.parametrize("shape", [(3, 0), (0, 8), (0, 0)], ids=str)
def test_empty_norms(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for name in ("layer_norm", "rms_norm"):
        assert getattr(F, name)(x, shape[-1:]).shape == getattr(T, name)(x, shape[-1:]).shape


# --- linear ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    agree(F.linear, T.linear, [torch.randn(4, 9, 40).to(dtype), torch.randn(24, 40).to(dtype) * 0.1,
                               torch.randn(24).to(dtype) if bias else None])  # fmt: skip


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_linear_under_autocast(low: torch.dtype, dtype: torch.dtype) -> None:
    tensors = [torch.randn(40, 16).to(dtype), torch.randn(24, 16), torch.randn(24)]
    tensors = [t.double() if dtype is torch.float64 else t for t in tensors]
    run = [lambda *t, f=f: _autocast(f, low, t) for f in (F.linear, T.linear)]
    agree(*run, tensors)


def _autocast(function, dtype: torch.dtype, tensors):
    with torch.autocast("cpu", dtype):
        return function(*tensors)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(2, 3).bfloat16(), torch.ones(4, 2).bfloat16()),
        (torch.ones(2, 3).bfloat16(), torch.ones(4, 3)),
        (torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16(), torch.ones(2).bfloat16()),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3)),
        (torch.ones(()).bfloat16(), torch.ones(4, 3).bfloat16()),
    ],
    ids=["widths", "dtypes", "bias", "integers", "scalar"],
)
def test_linear_refuses_what_torch_does(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError) as theirs:
        T.linear(*arguments)
    with pytest.raises(RuntimeError) as ours:
        F.linear(*arguments)
    assert str(ours.value) == str(theirs.value)


# --- softmax, embedding ---------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((3, 7), -1), ((3, 7), 0), ((2, 3, 5), 1), ((), 0), ((2, 0), 1)])
def test_softmax(name: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    agree(lambda x: getattr(F, name)(x, dim), lambda x: getattr(T, name)(x, dim), [torch.randn(shape).to(dtype)])
    x = torch.randn(shape).to(dtype)
    for wanted in CPU_DTYPES:
        torch.testing.assert_close(getattr(F, name)(x, dim, dtype=wanted), getattr(T, name)(x, dim, dtype=wanted))


BAD_SOFTMAX = {
    "dim too large": (X, 2),
    "dim too small": (X, -3),
    "integers": (X.long(), 0),
    "not a tensor": ([1.0], 0),
    "no dim": (X,),
    "integers to float32": (X.long(), 0, 3, torch.float32),
    "to integers": (X, 0, 3, torch.int64),
    "scalar": (torch.tensor(1.0), -1),
}


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("case", BAD_SOFTMAX)
def test_softmax_takes_and_refuses_what_torch_does(name: str, case: str) -> None:
    same_outcome(lambda module: getattr(module, name)(*BAD_SOFTMAX[case]))


IDS = torch.tensor([[0, 3, 3], [1, 0, 2]])
EMBEDDINGS = {
    "plain": (IDS, {}),
    "int32": (IDS.int(), {}),
    "padding": (IDS, {"padding_idx": 3}),
    "padding from the end": (IDS, {"padding_idx": -1}),
    "scaled by frequency": (IDS, {"scale_grad_by_freq": True}),
    "nothing": (IDS[:0], {}),
    "one": (IDS[0, 1], {}),
}


@each_dtype
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embedding(dtype: torch.dtype, case: str) -> None:
    ids, options = EMBEDDINGS[case]
    weight = torch.randn(4, 8).to(dtype)
    agree(lambda w: F.embedding(ids, w, **options), lambda w: T.embedding(ids, w, **options), [weight])


def test_embedding_options_are_torchs() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(F.embedding(IDS, weight, sparse=True).sum(), weight)
    assert grad.is_sparse
    renormed = 10 * torch.ones(4, 8)
    assert F.embedding(IDS, renormed, max_norm=1.0).norm(dim=-1).max() <= 1.0
    assert renormed[:, 0].max() < 1


BAD_EMBEDDING = {
    "floating ids": (X, X),
    "integer weight": (IDS, X.long()),
    "one dimension": (IDS, X[0]),
    "out of range": (IDS + 4, X),
    "negative": (IDS - 1, X),
    "padding out of range": (IDS, X, 4),
    "no rows": (IDS, X[:0]),
    "other device": (IDS.to("meta"), X),
}


@pytest.mark.parametrize("case", BAD_EMBEDDING)
def test_embedding_takes_and_refuses_what_torch_does(case: str) -> None:
    same_outcome(lambda module: module.embedding(*BAD_EMBEDDING[case]))


# --- attention -------------------------------------------------------------------------------------------------------

SHAPES = {  # query, key, value, options
    "4-D": ((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8), {}),
    "4-D causal": ((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8), {"is_causal": True}),
    "causal, longer keys": ((2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8), {"is_causal": True}),
    "other value width": ((2, 3, 6, 8), (2, 3, 5, 8), (2, 3, 5, 16), {}),
    "2-D": ((6, 8), (5, 8), (5, 8), {}),
    "3-D": ((4, 6, 8), (4, 5, 8), (4, 5, 8), {"scale": 0.3}),
    "5-D": ((2, 2, 3, 6, 8), (2, 2, 3, 6, 8), (2, 2, 3, 6, 8), {"is_causal": True}),
    "broadcast heads": ((2, 4, 6, 8), (2, 1, 6, 8), (2, 1, 6, 8), {}),
    "broadcast batch": ((2, 4, 6, 8), (1, 4, 6, 8), (1, 4, 6, 8), {}),
    "keys without batch": ((2, 4, 6, 8), (4, 6, 8), (4, 6, 8), {}),
    "grouped": ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), {"enable_gqa": True}),
    "grouped, other value heads": ((2, 4, 6, 8), (2, 2, 6, 8), (2, 1, 6, 8), {"enable_gqa": True}),
    "grouped 3-D": ((4, 6, 8), (2, 6, 8), (2, 6, 8), {"enable_gqa": True, "is_causal": True}),
    "grouped 5-D": ((1, 2, 4, 6, 8), (1, 2, 2, 6, 8), (1, 2, 2, 6, 8), {"enable_gqa": True}),
    "empty batch": ((0, 4, 6, 8), (0, 4, 6, 8), (0, 4, 6, 8), {}),
    "no queries": ((2, 4, 0, 8), (2, 4, 6, 8), (2, 4, 6, 8), {}),
}


@each_dtype
@pytest.mark.parametrize("case", SHAPES)
def test_attention(dtype: torch.dtype, case: str) -> None:
    *shapes, options = SHAPES[case]
    tensors = [torch.randn(s).to(dtype) for s in shapes]
    agree(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
          lambda q, k, v: T.scaled_dot_product_attention(q, k, v, **options), tensors)  # fmt: skip


@pytest.mark.parametrize("mask_shape", [(6, 7), (1, 7), (6, 1), (1, 1), (3, 6, 7), (2, 1, 1, 7), (2, 3, 6, 7)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_masks(mask_shape: tuple[int, ...], kind: str) -> None:
    q, k, v = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(mask_shape) < 0.7 if kind == "bool" else torch.randn(mask_shape)
    for grow in (lambda t: t, lambda t: t[None]):
        agree(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
              lambda q, k, v: T.scaled_dot_product_attention(q, k, v, mask if kind == "bool" else mask.to(q.dtype)),
              [grow(t) for t in (q, k, v)])  # fmt: skip


def test_attention_5d_mask() -> None:
    q, mask = torch.randn(2, 2, 3, 6, 8), torch.rand(2, 1, 3, 6, 6) < 0.7
    agree(lambda q: F.scaled_dot_product_attention(q, q, q, mask),
          lambda q: T.scaled_dot_product_attention(q, q, q, mask), [q])  # fmt: skip


def test_attention_without_keys_is_zero() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 0, 8)
    assert torch.equal(F.scaled_dot_product_attention(q, k, k), torch.zeros(2, 4, 6, 8))


Q = torch.ones(2, 4, 6, 8)
BAD_ATTENTION = {
    "1-D": ((Q[0, 0, 0],) * 3, {}),
    "heads": ((Q, Q[:, :2], Q[:, :2]), {}),
    "batch": ((Q.repeat(2, 1, 1, 1), Q.repeat(3, 1, 1, 1)[:3], Q.repeat(3, 1, 1, 1)[:3]), {}),
    "width": ((Q, Q[..., :4], Q), {}),
    "grouped without heads": ((Q[0, 0],) * 3, {"enable_gqa": True}),
    "heads not dividing": ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    "more key heads": ((Q[:, :2], Q, Q), {"enable_gqa": True}),
    "integer mask": ((Q, Q, Q, torch.ones(6, 6, dtype=torch.int64)), {}),
    "float64 mask": ((Q, Q, Q, torch.ones(6, 6, dtype=torch.float64)), {}),
    "bfloat16 mask": ((Q, Q, Q, torch.ones(6, 6, dtype=torch.bfloat16)), {}),
    "mask shape": ((Q, Q, Q, torch.ones(6, 5, dtype=torch.bool)), {}),
    "mask 1-D": ((Q, Q, Q, torch.ones(6, dtype=torch.bool)), {}),
    "mask 5-D": ((Q, Q, Q, torch.ones(1, 1, 1, 6, 6, dtype=torch.bool)), {}),
    "mask with more batches": ((Q[:1], Q[:1], Q[:1], torch.ones(3, 4, 6, 6, dtype=torch.bool)), {}),
    "dtypes": ((Q, Q.bfloat16(), Q), {}),
    "integers": ((Q.long(),) * 3, {}),
    "dropout": ((Q, Q, Q), {"dropout_p": 1.5}),
    "negative dropout": ((Q, Q, Q), {"dropout_p": -0.5}),
    "devices": ((Q, Q.to("meta"), Q), {}),
    "not a tensor": ((Q, None, Q), {}),
    "query not a tensor": ((None, Q, Q), {}),
}


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_attention_refuses_what_torch_refuses(case: str) -> None:
    arguments, options = BAD_ATTENTION[case]
    with pytest.raises(Exception) as theirs:
        T.scaled_dot_product_attention(*arguments, **options)
    with pytest.raises(theirs.type):
        F.scaled_dot_product_attention(*arguments, **options)


def test_attention_refuses_mask_and_causal() -> None:
    """As torch documents; some of its kernels take both."""
    mask = torch.ones(6, 6, dtype=torch.bool)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), pytest.raises(RuntimeError):
        T.scaled_dot_product_attention(Q, Q, Q, mask, is_causal=True)
    with pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(Q, Q, Q, mask, is_causal=True)


def test_attention_refuses_another_length_of_values() -> None:
    with pytest.raises(RuntimeError, match="one length"):
        F.scaled_dot_product_attention(Q, Q, Q[:, :, :3])


def test_attention_dropout_is_unbiased() -> None:
    q, v = torch.randn(1, 8, 64, 16), torch.ones(1, 8, 64, 16)
    out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
    assert not torch.equal(out, torch.ones_like(out))
    assert abs(out.mean().item() - 1.0) < 0.05


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype, lowered: torch.dtype) -> None:
    q, mask = torch.randn(2, 4, 6, 8).to(dtype), torch.zeros(6, 6)
    with torch.autocast("cpu", lowered):
        same_outcome(lambda module: module.scaled_dot_product_attention(q, q, q))
        same_outcome(lambda module: module.layer_norm(q, (8,)))
        same_outcome(lambda module: module.rms_norm(q, (8,)))
        same_outcome(lambda module: module.softmax(q, -1))
        same_outcome(lambda module: module.embedding(IDS, q[0, 0]))
        if dtype is not torch.float64:  # torch lowers the mask but not a float64 query, then refuses the pair
            same_outcome(lambda module: module.scaled_dot_product_attention(q, q, q, mask))


def test_autocast_gradients_come_back_in_float32() -> None:
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        expected = T.scaled_dot_product_attention(q, q, q, is_causal=True)
    upstream = torch.randn(out.shape).bfloat16()
    (ours,), (theirs,) = torch.autograd.grad(out, q, upstream), torch.autograd.grad(expected, q, upstream)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
