"""The dropout of add_layer_norm and add_rms_norm: every backend drops the same elements, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.reference._random import kept
from tests.ops.harness import (
    BACKWARD,
    FORWARD,
    assert_all_accurate,
    assert_same_bits,
    differentiate,
    each_backend,
    each_dtype,
    on,
)

SHAPES = [(1, 1), (3, 17), (2, 3, 256), (65, 33)]
each_op = pytest.mark.parametrize("op", [ops.add_layer_norm, ops.add_rms_norm], ids=lambda op: op.__name__)


def norm(op: Callable[..., tuple[Tensor, Tensor]], h: Tensor, weight: Tensor) -> Tensor:
    """torch's own."""
    name = F.layer_norm if op is ops.add_layer_norm else F.rms_norm
    return name(h, h.shape[-1:], weight, eps=1e-5)


def next_mask(shape: tuple[int, ...], dropout: float) -> Tensor:
    """What the next call will keep; the generator stays where it was."""
    zero = torch.zeros(())  # on the device of the test
    state = torch.cuda.get_rng_state() if zero.is_cuda else torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (1,))
    (torch.cuda.set_rng_state if zero.is_cuda else torch.set_rng_state)(state)
    return kept(seed, dropout, torch.Size(shape[:-1]).numel(), torch.arange(shape[-1])).view(shape)


@each_backend
@each_dtype
@each_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend: str, dtype: torch.dtype, op: Callable[..., tuple[Tensor, Tensor]], shape) -> None:
    tensors = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
    keep = next_mask(shape, 0.3)

    def formula(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.where(keep, x / 0.7, 0) + residual
        return norm(op, h, weight), h

    with on(backend):
        outputs, grads = differentiate(lambda x, r, w: op(x, r, w, eps=1e-5, dropout=0.3), tensors)
    oracle, oracle_grads = differentiate(formula, [t.double() for t in tensors])
    eager, eager_grads = differentiate(formula, tensors)
    assert [o.dtype for o in outputs] == [dtype, dtype]
    assert_all_accurate(["y", "h"], outputs, oracle, eager, FORWARD)
    assert_all_accurate(["dx", "dresidual", "dweight"], grads, oracle_grads, eager_grads, BACKWARD)
    assert bool((grads[0][~keep] == 0).all())


@each_backend
@each_op
@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.999])
def test_drops_what_the_hash_says(backend: str, op: Callable[..., tuple[Tensor, Tensor]], dropout: float) -> None:
    shape = (40, 1000)
    keep = next_mask(shape, dropout)
    with on(backend), torch.no_grad():
        _, h = op(torch.ones(shape), torch.zeros(shape), dropout=dropout)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(h[keep], torch.full_like(h[keep], 1 / (1 - dropout)))
    assert abs(keep.double().mean() - (1 - dropout)) < 0.01


@each_backend
@each_op
def test_rows_too_long_for_registers(backend: str, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    tensors = [torch.randn(2, 8200), torch.randn(2, 8200), torch.randn(8200)]
    keep = next_mask((2, 8200), 0.5)
    with on(backend):
        (y, h), grads = differentiate(lambda x, r, w: op(x, r, w, eps=1e-5, dropout=0.5), tensors)

    def formula(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.where(keep, x / 0.5, 0) + residual
        return norm(op, h, weight), h

    (expected_y, expected_h), expected_grads = differentiate(formula, [t.double() for t in tensors])
    for a, e in zip((y, h, *grads), (expected_y, expected_h, *expected_grads), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@each_backend
@each_op
def test_a_dropped_value_does_not_matter(backend: str, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    shape = (9, 70)
    x, residual = torch.randn(shape), torch.randn(shape)
    keep = next_mask(shape, 0.5)
    with on(backend), torch.no_grad():
        _, h = op(torch.where(keep, x, torch.nan), residual, dropout=0.5)
    assert bool(h.isfinite().all())
    assert torch.equal(h[~keep], residual[~keep])


@each_backend
@each_op
def test_zero_draws_nothing_and_a_seed_repeats(backend: str, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    tensors = [torch.randn(33, 40), torch.randn(33, 40), torch.randn(40)]
    with on(backend):
        plain = differentiate(op, tensors)
        before = torch.get_rng_state()
        none = differentiate(lambda *t: op(*t, dropout=0.0), tensors)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(3)
        first = differentiate(lambda *t: op(*t, dropout=0.2), tensors)
        second = differentiate(lambda *t: op(*t, dropout=0.2), tensors)
        torch.manual_seed(3)
        again = differentiate(lambda *t: op(*t, dropout=0.2), tensors)
    assert_same_bits([*plain[0], *plain[1]], [*none[0], *none[1]])
    assert_same_bits([*first[0], *first[1]], [*again[0], *again[1]])
    assert not torch.equal(first[0][1], second[0][1])


@each_backend
@each_op
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only h"])
def test_with_one_output_used(backend: str, op: Callable[..., tuple[Tensor, Tensor]], used: int) -> None:
    leaves = [t.requires_grad_() for t in (torch.randn(4, 32), torch.randn(4, 32), torch.randn(32))]
    keep = next_mask((4, 32), 0.4)
    with on(backend):
        result = op(*leaves, eps=1e-5, dropout=0.4)[used].square().sum()
        actual = torch.autograd.grad(result, leaves, retain_graph=True, materialize_grads=True)
        assert_same_bits(actual, torch.autograd.grad(result, leaves, materialize_grads=True))
    h = torch.where(keep, leaves[0] / 0.6, 0) + leaves[1]
    expected = torch.autograd.grad(
        (norm(op, h, leaves[2]) if used == 0 else h).square().sum(), leaves, materialize_grads=True
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_backend
@each_op
def test_torch_compile_fullgraph(backend: str, op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    torch._dynamo.reset()
    x, residual, weight = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
    with on(backend):
        compiled = torch.compile(lambda *t: op(*t, dropout=0.5), fullgraph=True, backend="aot_eager")
        outputs, grads = differentiate(compiled, [x, residual, weight], [torch.zeros(4, 32), torch.ones(4, 32)])
    dropped = outputs[1] == residual
    assert 0 < int(dropped.sum()) < 128
    assert torch.equal(grads[0], torch.where(dropped, 0.0, 2.0))
    assert torch.equal(grads[1], torch.ones(4, 32))


@each_op
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0])
def test_bad_probabilities(op: Callable[..., tuple[Tensor, Tensor]], dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        op(torch.ones(2, 3), torch.ones(2, 3), dropout=dropout)
