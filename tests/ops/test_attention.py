"""attention: every case on every backend and instruction set, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.attention import OP
from tests.ops.attention_oracle import (
    BACKENDS,
    INF,
    Case,
    check,
    compare,
    each_backend,
    each_pair,
    finest,
    formula,
    make,
    near,
)
from tests.ops.harness import (
    assert_same_bits,
    assert_same_values,
    differentiate,
    on,
    refuses,
    sizes,
)

one_of_each = pytest.mark.parametrize("backend", dict.fromkeys([BACKENDS[0], BACKENDS[-1]]))  # what no ISA changes
ARGUMENTS = {"q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 2, 5, 8), "v": torch.ones(2, 2, 5, 6)}
CASES = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 4, 4, 64, 64, 32, 32, True),
    Case(1, 2, 2, 63, 65, 7, 7),
    Case(1, 2, 1, 65, 63, 40, 40, "bottom-right"),
    Case(2, 3, 1, 97, 127, 59, 80, "top-left"),
    Case(1, sizes(8, 3), 1, 113, 64, 111, 111, "bottom-right"),
    Case(1, 2, 2, 129, 129, 64, 64, True),
    Case(1, sizes(6, 3), sizes(2, 1), 129, sizes(300, 150), 80, 96, "bottom-right"),
    Case(1, 1, 1, 300, 97, 128, 128, True),
    Case(1, 1, 1, 65, 70, 256, 256, True),
    Case(1, 1, 1, 70, 65, 16, 200),
    Case(1, 1, 1, 1, 127, 64, 64, "bottom-right"),
    Case(1, 1, 1, 127, 2, 64, 64),
    Case(1, 1, 1, 520, 90, 32, 32, "bottom-right"),
    Case(2, 2, 1, 70, 100, 32, 32, False, "bool (B,H,S,T)"),
    Case(2, 2, 2, 66, 130, 24, 24, True, "bool (B,1,1,T)"),
    Case(2, 4, 2, 40, 70, 16, 16, False, "float (1,H,S,T)"),
    Case(2, 2, 2, 33, 66, 16, 8, "bottom-right", "float (B,1,S,1)"),
    Case(2, 2, 2, 50, 66, 16, 16, False, "float (H,1,T)"),
    Case(2, 2, 2, 20, 30, 16, 16, False, "float (1,1,1,1)"),
    Case(1, 2, 2, 65, 65, 32, 32, True, "", -0.3),
    Case(1, 2, 2, 65, 65, 32, 32, False, "", 1e-3),
]


@each_pair
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, case: Case) -> None:
    compare(backend, case, dtype)


MANY_TILES = [
    Case(1, 4, 2, 200, 420, 64, 64, "bottom-right"),
    Case(1, 2, 2, 420, 200, 40, 64, False, window=(150, 70)),
    Case(1, 2, 1, 150, 400, 128, 128),
    Case(1, 1, 1, 260, 260, 96, 128, True),
    Case(1, 1, 1, 70, 330, 256, 256, "bottom-right"),
]


@each_backend
@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_more_tiles_than_are_held_at_once(backend: str, case: Case) -> None:
    """On both sides, and so that what is seen starts and ends anywhere among them."""
    compare(backend, case, torch.bfloat16)


@each_pair
def test_bias_in_the_dtype_of_q(backend: str, dtype: torch.dtype) -> None:
    check(backend, make(Case(2, 2, 2, 70, 66, 16, 16), dtype), torch.randn(2, 70, 66).to(dtype), causal=True)


@each_backend
@pytest.mark.parametrize("empty", [Case(0, 2, 1, 5, 6, 8, 8), Case(2, 2, 2, 0, 6, 8, 8), Case(2, 2, 2, 5, 0, 8, 8)])
def test_empty(backend: str, empty: Case) -> None:
    with on(backend):
        (out, lse), grads = differentiate(
            lambda *x: ops.attention(*x, causal=True, return_lse=True), make(empty, finest(backend))
        )
    assert out.shape == (empty.B, empty.H, empty.S, empty.Dv) and bool((out == 0).all())
    assert lse.shape == out.shape[:3] and bool((lse == -INF).all())
    assert all(bool((g == 0).all()) for g in grads)


@each_backend
def test_one_key_and_scale_zero(backend: str) -> None:
    """Weights that do not depend on q and k: their gradients are 0 up to rounding."""
    for case in (Case(1, 2, 2, 70, 1, 32, 32), Case(1, 2, 2, 30, 40, 32, 32, scale=0.0)):
        dtype = finest(backend)
        tensors = make(case, dtype)
        with on(backend):
            (out,), grads = differentiate(lambda *x, c=case: ops.attention(*x, scale=c.scale), tensors)
        mean = tensors[2].double().mean(2, keepdim=True).expand(out.shape).to(dtype)
        torch.testing.assert_close(out, mean, **near(dtype))
        for grad in grads[:2]:
            torch.testing.assert_close(
                grad, torch.zeros_like(grad), atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0
            )


# --- memory layouts ---------------------------------------------------------------------------------------------------


@each_backend
def test_every_layout_gives_the_same(backend: str) -> None:
    """All orders of dimensions, slices that break alignment, stride-0 keys."""
    s = sizes(70, 20)
    tensors = make(Case(2, 2, 2, s, s, 24, 24), finest(backend))
    run = lambda q, k, v: ops.attention(q, k, v, causal=True)  # noqa: E731
    with on(backend):
        out, grads = differentiate(run, tensors)
        for order in itertools.permutations(range(4)):
            back = [order.index(d) for d in range(4)]
            views = [x.permute(order).contiguous().permute(back) for x in tensors]
            other, other_grads = differentiate(run, views)
            assert_same_values(backend, [*other, *other_grads], [*out, *grads], str(order))
        packed = torch.full((2, s, 3, 2, 25), float("nan"), dtype=finest(backend))
        packed[..., 1:] = torch.stack([x.transpose(1, 2) for x in tensors], 2)
        views = [packed[:, :, i, :, 1:].transpose(1, 2) for i in range(3)]
        other, other_grads = differentiate(run, views)
        assert_same_values(backend, [*other, *other_grads], [*out, *grads], "packed")
        q, k, v = tensors
        one = [q, k[:1, :1].expand(2, 2, s, 24), v[:1, :1].expand(2, 2, s, 24)]
        expected = differentiate(run, [q, one[1].contiguous(), one[2].contiguous()])
        other = differentiate(run, one)
        assert_same_values(backend, [*other[0], *other[1]], [*expected[0], *expected[1]], "expanded")


@each_backend
def test_output_keeps_the_layout_of_q(backend: str) -> None:
    dtype = finest(backend)
    q, k, v = (torch.randn(2, 9, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    with on(backend):
        out = ops.attention(q, k, v)
        assert out.transpose(1, 2).is_contiguous()
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert all(g.transpose(1, 2).is_contiguous() for g in grads)
        assert ops.attention(q.contiguous(), k, v).is_contiguous()


@each_backend
def test_expanded_and_strided_upstream(backend: str) -> None:
    tensors = make(Case(2, 2, 1, 30, 40, 16, 16), finest(backend))
    with on(backend):
        for grad in (
            torch.randn(()).expand(2, 2, 30, 16),
            torch.randn(2, 1, 1, 16).expand(2, 2, 30, 16),
            torch.randn(2, 1, 30, 1).expand(2, 2, 30, 16),
            torch.randn(16, 30, 2, 2).permute(2, 3, 1, 0),
        ):
            _, expected = differentiate(ops.attention, tensors, [grad.contiguous()])
            _, grads = differentiate(ops.attention, tensors, [grad])
            assert_same_values(backend, grads, expected, "upstream")
        both = lambda *x: ops.attention(*x, return_lse=True)  # noqa: E731
        for grad in (torch.randn(2, 1, 1).expand(2, 2, 30), torch.randn(30, 2, 2).permute(1, 2, 0)):
            out = torch.randn(2, 2, 30, 16)
            _, expected = differentiate(both, tensors, [out, grad.contiguous()])
            _, grads = differentiate(both, tensors, [out, grad])
            assert_same_values(backend, grads, expected, "upstream of lse")


# --- repeatability ----------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["finest", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    sizes(
        [Case(2, 6, 6, 200, 200, 32, 32, True), Case(1, 4, 1, 300, 200, 32, 32)],
        [Case(1, 2, 2, 130, 130, 32, 32, True), Case(1, 4, 1, 100, 70, 32, 32)],
    ),
    ids=str,
)
def test_same_bits_again_and_for_any_thread_count(backend: str, dtype: torch.dtype | None, case: Case) -> None:
    tensors, bias = make(case, dtype or finest(backend)), torch.randn(case.S, case.T)
    run = lambda q, k, v, m: ops.attention(q, k, v, mask=m, causal=case.causal, dropout=0.1)  # noqa: E731
    results = []
    with on(backend):
        for threads in (2, 2, 1, 3) if backend.startswith("cpu") else (2, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            out, grads = differentiate(run, [*tensors, bias])
            results.append([*out, *grads])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_the_last_batch_alone(backend: str) -> None:
    """Many small heads, more than 65535 in all: offsets and grid limits."""
    q, k, v = (torch.randn(sizes(8200, 20), 8, 1, 8).to(finest(backend)) for _ in range(3))
    with on(backend):
        whole, alone = ops.attention(q, k, v), ops.attention(q[-1:], k[-1:], v[-1:])
    assert torch.equal(whole[-1:], alone)


# --- lse --------------------------------------------------------------------------------------------------------------


@each_backend
def test_gradients_with_one_output_used(backend: str) -> None:
    dtype = finest(backend)
    tensors = make(Case(1, 2, 1, 40, 50, 16, 16), dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    for used in (0, 1):
        with on(backend):
            _, grads = differentiate(lambda *x, u=used: ops.attention(*x, return_lse=True)[u], tensors)
        oracle = [x.double().requires_grad_() for x in tensors]
        result = formula(*oracle)[used]
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(result.shape, generator=generator).to(torch.bfloat16)
        expected = torch.autograd.grad(result, oracle, upstream.double(), allow_unused=True)
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.double(), torch.zeros_like(grad).double() if want is None else want,
                                       **tolerance)  # fmt: skip


@each_backend
def test_halves_merge_by_their_lse(backend: str) -> None:
    q, k, v = make(Case(1, 2, 2, 30, 130, 16, 16), finest(backend))
    with on(backend):
        whole = ops.attention(q, k, v)
        parts = [ops.attention(q, k[:, :, r], v[:, :, r], return_lse=True) for r in (slice(0, 70), slice(70, 130))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(w.unsqueeze(-1) * o for w, (o, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged.to(whole.dtype), whole, **near(whole.dtype))


# --- the pattern around the kernel ------------------------------------------------------------------------------------


@one_of_each
def test_torch_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    bias, dtype = torch.randn(2, 1, 1), finest(backend)

    def run(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.attention(q.transpose(1, 2), k, v, mask=m, causal="bottom-right", return_lse=True)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1) * 2, lse

    with on(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for s, t in ((20, 30), (33, 40)):
            tensors = [torch.randn(n).to(dtype) for n in ((2, s, 2, 8), (2, 1, t, 8), (2, 1, t, 8))]
            tensors.append(bias)
            expected, actual = differentiate(run, tensors), differentiate(compiled, tensors)
            assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])
        dropped = torch.compile(lambda *x: ops.attention(*x, dropout=0.5), fullgraph=True, backend="aot_eager")
        out, grads = differentiate(dropped, make(Case(1, 2, 2, 20, 20, 8, 8), dtype))
        assert bool(out[0].isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)
        itself = lambda x: ops.attention(x, x, x, causal=True)  # noqa: E731
        x = torch.randn(1, 2, 20, 8).to(dtype)
        expected = differentiate(itself, [x])
        actual = differentiate(torch.compile(itself, fullgraph=True, backend="aot_eager"), [x])
        torch.testing.assert_close(actual, expected, **near(dtype))  # three gradients, added in another order


@one_of_each
def test_opcheck(backend: str) -> None:
    name = backend.partition("-")[0]
    _, k, v = make(Case(2, 4, 2, 10, 12, 8, 6), finest(backend))
    q = torch.randn(2, 10, 4, 8).to(k.dtype).transpose(1, 2)
    mask, seed = torch.randn(4, 1, 12)[None], torch.tensor([3])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with on(backend):
        library, tensors, options = (
            torch.ops.fastlm,
            (q, k, v, mask, seed, *[None] * 6),
            (10, 12, 1, -1, -1, 0.0, 0.3, 0.1),
        )
        torch.library.opcheck(library.attention_forward, (*tensors, *options, name), test_utils=tests)
        out, lse = library.attention_forward(*tensors, *options, name)
        arguments = (torch.randn_like(out), torch.randn_like(lse), *tensors, out, lse, *options, True, name)
        torch.library.opcheck(library.attention_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    q, k, v = (x.double().requires_grad_() for x in make(Case(1, 4, 2, 3, 5, 4, 2)))
    bias = torch.randn(4, 1, 5).double().requires_grad_()

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return ops.attention(*x[:3], mask=x[3], causal="bottom-right", dropout=dropout, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v, bias), fast_mode=True)


@each_backend
def test_double_backward_raises(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in make(Case(1, 1, 1, 3, 3, 4, 4), finest(backend)))
    with on(backend):
        (dq,) = torch.autograd.grad(ops.attention(q, k, v), q, torch.randn_like(q), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dq.square().sum() + q.sum()).backward()


@each_backend
def test_no_grad_and_frozen_inputs(backend: str) -> None:
    q, k, v = make(Case(1, 2, 2, 9, 9, 8, 8), finest(backend))
    with on(backend):
        with torch.no_grad():
            quiet = ops.attention(q, k, v)
        loud = ops.attention(q, k.requires_grad_(), v)
        assert torch.equal(quiet, loud)
        loud.sum().backward()
        loud = ops.attention(q, k, v)
        loud.sum().backward(retain_graph=True)
        loud.sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None


@each_backend
def test_large_head_dim_goes_to_the_reference(backend: str) -> None:
    q, k, v = make(Case(1, 1, 1, 4, 4, 257, 8), finest(backend))
    assert refuses(OP, backend, q, head_dim=257) == (backend != "reference")
    with on(backend):
        if backend == "reference":
            return torch.testing.assert_close(ops.attention(q, k, v), formula(q, k, v)[0])
        with pytest.raises(fastlm.UnsupportedError, match="head_dim is 257, above the limit 256"):
            ops.attention(q, k, v)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": torch.ones(4, 3, 8)}, ValueError, "q must be"),
        ({"q": [1.0]}, TypeError, "q must be a Tensor"),
        ({"k": torch.ones(2, 2, 5, 7)}, ValueError, "k must be"),
        ({"v": torch.ones(2, 2, 4, 6)}, ValueError, "v must be"),
        ({"k": torch.ones(2, 3, 5, 8), "v": torch.ones(2, 3, 5, 6)}, ValueError, "heads of q"),
        ({"v": torch.ones(2, 2, 5, 6).bfloat16()}, ValueError, "v must have the dtype of q"),
        ({"v": torch.ones(2, 2, 5, 6, device="meta")}, ValueError, "v must be on the device of q"),
        ({"k": torch.ones(2, 2, 5, 8).long()}, TypeError, "k must be floating point"),
        ({"mask": torch.ones(3, 5).long()}, TypeError, "mask must be bool"),
        ({"mask": "causal"}, TypeError, "mask must be a Tensor"),
        ({"mask": torch.ones(3, 4)}, ValueError, "mask must be broadcastable"),
        ({"mask": torch.ones(3, 5, device="meta")}, ValueError, "mask must be on the device of q"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"causal": "upper-left"}, ValueError, "causal must be"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.attention(**ARGUMENTS | changes)
