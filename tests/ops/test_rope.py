"""rope: every case on every backend and instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from tests.ops.harness import (
    BACKWARD,
    FORWARD,
    assert_all_accurate,
    assert_same_bits,
    assert_same_values,
    differentiate,
    each_backend,
    each_dtype,
    on,
)

# B, H, Hk, S, D, R and whether each batch has its own table
SIZES = [
    (1, 1, 1, 1, 2, 2, False),
    (2, 3, 1, 7, 30, 30, True),
    (2, 4, 2, 33, 64, 64, False),
    (2, 2, 2, 65, 96, 32, True),
    (0, 2, 1, 3, 8, 8, False),
    (2, 2, 1, 0, 8, 8, True),
    (1, 3, 3, 5, 80, 34, False),
    (1, 1, 2, 40, 256, 256, True),
]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(s: int, r: int, batch: int | None = None) -> tuple[Tensor, Tensor]:
    positions = torch.arange(s) if batch is None else torch.randint(0, 5000, (batch, s))
    angles = positions[..., None] * 10_000 ** (-torch.arange(0, r, 2) / r)
    return angles.cos(), angles.sin()


def torch_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The usual formula: x cos + rotate(x) sin with tables as wide as the rotated channels."""
    r = 2 * cos.shape[-1]
    cos, sin = (t.to(x.dtype) if t.dim() == 2 else t.to(x.dtype)[:, None] for t in (cos, sin))
    turned, rest = x[..., :r], x[..., r:]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        other = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), -1)
    return torch.cat((turned * cos + other * sin, rest), -1)


def inputs(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    b, h, hk, s, d = size[:5]
    return torch.randn(b, h, s, d).to(dtype), torch.randn(b, hk, s, d).to(dtype)


@each_backend
@each_dtype
@each_pairing
@each_size
def test_matches_float64(backend: str, dtype: torch.dtype, interleaved: bool, size: tuple[int, ...]) -> None:
    q, k = inputs(size, dtype)
    cos, sin = tables(size[3], size[5], size[0] if size[6] else None)

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope(q, cos, sin, interleaved), torch_rope(k, cos, sin, interleaved)

    oracle, oracle_grads = differentiate(formula, [q.double(), k.double()])
    eager, eager_grads = differentiate(formula, [q, k])
    with on(backend):
        actual, grads = differentiate(lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved), [q, k])
    assert [t.dtype for t in (*actual, *grads)] == [dtype] * 4
    assert_all_accurate(["q'", "k'"], actual, oracle, eager, FORWARD)
    assert_all_accurate(["dq", "dk"], grads, oracle_grads, eager_grads, BACKWARD)


@each_backend
@each_pairing
def test_layouts_are_kept(backend: str, interleaved: bool) -> None:
    """A (B, S, H, D) tensor seen as (B, H, S, D) comes back that way; so do the parts of a packed projection."""
    b, h, s, d = 2, 3, 37, 32
    cos, sin = tables(s, d)
    packed = torch.randn(b, s, 3 * h * d)
    whole = [part.unflatten(-1, (h, d)).transpose(1, 2) for part in packed.split(h * d, -1)]
    odd = torch.randn(b, h, s, d + 1)[..., 1:]
    last = torch.randn(b, h, d, s).transpose(2, 3)
    with on(backend):
        for q, k in [(whole[0], whole[1]), (odd, whole[2]), (last, odd), (odd[:, :, :1].expand(b, h, s, d), odd)]:
            plain = differentiate(lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved),
                                  [q.contiguous(), k.contiguous()])  # fmt: skip
            outputs, grads = differentiate(lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved), [q, k])
            assert_same_values(backend, [*outputs, *grads], [*plain[0], *plain[1]])
            for x, y in ((q, outputs[0]), (k, outputs[1])):
                assert (y.transpose(1, 2) if x.stride(1) < x.stride(2) else y).is_contiguous()


@each_backend
def test_queries_alone_and_one_gradient(backend: str) -> None:
    q, k = inputs((2, 3, 2, 9, 16), torch.float32)
    cos, sin = tables(9, 16)
    with on(backend):
        both, both_grads = differentiate(lambda q, k: ops.rope(q, k, cos, sin), [q, k])
        (alone,), (dq,) = differentiate(lambda q: ops.rope(q, None, cos, sin), [q])
        assert torch.equal(alone, both[0]) and torch.equal(dq, both_grads[0])
        leaves = [q.requires_grad_(), k.requires_grad_()]
        for i in (0, 1):
            outputs = ops.rope(*leaves, cos, sin)
            grad = torch.randn_like(outputs[i])
            alone_grads = torch.autograd.grad(outputs[i], leaves, grad, allow_unused=True)
            expected = torch.autograd.grad(ops.rope(leaves[i], None, cos, sin), leaves[i], grad)
            assert alone_grads[1 - i] is None
            assert_same_values(backend, [alone_grads[i]], expected)


@each_backend
@each_pairing
def test_rotation_keeps_lengths_and_turns_back(backend: str, interleaved: bool) -> None:
    q, k = inputs((1, 2, 2, 50, 64), torch.float32)
    cos, sin = tables(50, 64)
    with on(backend):
        q1, k1 = ops.rope(q, k, cos, sin, interleaved=interleaved)
        q2, _ = ops.rope(q1, k1, cos, -sin, interleaved=interleaved)
    torch.testing.assert_close(q1.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(q2, q)
    assert torch.equal(q1[:, :, 0], q[:, :, 0])  # position 0 is not turned


@each_backend
def test_expanded_upstream_and_inputs_left_alone(backend: str) -> None:
    q = torch.randn(2, 2, 11, 16)
    cos, sin = tables(11, 16)
    kept = q.clone()
    with on(backend):
        for grad in (torch.randn(2, 2, 1, 16).expand(2, 2, 11, 16), torch.randn(()).expand(2, 2, 11, 16)):
            _, expected = differentiate(lambda q: ops.rope(q, None, cos, sin), [q], [grad.contiguous()])
            _, grads = differentiate(lambda q: ops.rope(q, None, cos, sin), [q], [grad])
            assert_same_values(backend, grads, expected)
    assert torch.equal(q, kept)


@each_backend
def test_tables_of_other_dtypes(backend: str) -> None:
    q, _ = inputs((1, 2, 1, 5, 16), torch.bfloat16)
    cos, sin = (t.bfloat16() for t in tables(5, 16))
    with on(backend):
        assert torch.equal(ops.rope(q, None, cos, sin), ops.rope(q, None, cos.float(), sin.float()))


@each_backend
def test_tables_of_any_strides(backend: str) -> None:
    q, _ = inputs((2, 2, 1, 5, 16), torch.float32)
    cos, sin = tables(5, 16, 2)
    part = torch.cat((cos, sin), -1)
    with on(backend):
        expected = ops.rope(q, None, cos, sin)
        for c, s in [(part[..., :8], sin), (part[..., :8], part[..., 8:]), (cos.mT.contiguous().mT, part[..., 8:])]:
            assert_same_values(backend, [ops.rope(q, None, c, s)], [expected])


@each_backend
def test_same_bits_again_and_for_any_thread_count(backend: str) -> None:
    q, k = inputs((2, 4, 2, 200, 64), torch.float32)
    cos, sin = tables(200, 64)
    with on(backend):
        first = differentiate(lambda q, k: ops.rope(q, k, cos, sin), [q, k])
        again = differentiate(lambda q, k: ops.rope(q, k, cos, sin), [q, k])
        torch.set_num_threads(1)
        alone = differentiate(lambda q, k: ops.rope(q, k, cos, sin), [q, k])
    for other in (again, *([alone] if backend != "reference" else [])):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])


@each_backend
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    with on(backend):
        compiled = torch.compile(lambda *t: ops.rope(*t)[0] * 2, fullgraph=True, backend="aot_eager")
        for s in (4, 9):
            q, k = inputs((2, 2, 1, s, 16), torch.float32)
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
            cos, sin = tables(s, 16)
            expected, expected_grads = differentiate(lambda q, c=cos, s=sin, k=k: ops.rope(q, k, c, s)[0] * 2, [q])
            actual, grads = differentiate(lambda q, c=cos, s=sin, k=k: compiled(q, k, c, s), [q])
            assert actual[0].stride() == expected[0].stride()
            assert_same_bits([*actual, *grads], [*expected, *expected_grads])


@each_backend
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    q, k = inputs((2, 2, 1, 5, 16), torch.float32)
    cos, sin = tables(5, 16)
    with on(backend):
        library = torch.ops.fastlm
        for query in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.library.opcheck(library.rope_forward, (query, k, cos, sin, False, name))
            torch.library.opcheck(library.rope_backward, (query, None, cos, sin, True, name))


@each_pairing
def test_gradcheck(interleaved: bool) -> None:
    q, k = (t.double().requires_grad_() for t in inputs((1, 2, 1, 3, 8), torch.float32))
    cos, sin = (t.double() for t in tables(3, 4))
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved), [q, k])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    q = torch.randn(1, 1, 3, 4).requires_grad_()
    cos, sin = tables(3, 4)
    with on(backend):
        (dq,) = torch.autograd.grad(ops.rope(q, None, cos, sin), q, torch.randn(1, 1, 3, 4), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dq.square().sum() + q.sum()).backward()


def call(q=(1, 2, 3, 4), k=(1, 1, 3, 4), cos=(3, 2), sin=(3, 2), dtype=torch.float32, **options):
    shapes = (torch.ones(q, dtype=dtype), None if k is None else torch.ones(k), torch.ones(cos), torch.ones(sin))
    return ops.rope(*shapes, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"q": (3, 4)}, ValueError, r"q must be \(B, H, S, D\)"),
        ({"dtype": torch.int64}, TypeError, "q must be floating point"),
        ({"k": (1, 1, 2, 4)}, ValueError, "k must be"),
        ({"dtype": torch.bfloat16}, ValueError, "k must be"),
        ({"cos": (4, 2)}, ValueError, "cos must be"),
        ({"cos": (3, 3)}, ValueError, "cos must be"),
        ({"cos": (2, 3, 2)}, ValueError, "cos must be"),
        ({"sin": (3, 1)}, ValueError, "cos and sin must have one shape"),
        ({"dtype": torch.float64, "k": None, "backend": "cpu"}, fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        call(**arguments)


def test_tables_that_require_a_gradient_are_refused() -> None:
    q, cos = torch.ones(1, 1, 2, 4), torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="cos must not require a gradient"):
        ops.rope(q, None, cos, cos)
