"""attention's dropout: one mask for every backend, in forward, backward and recomputation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.reference.attention import kept
from tests.ops.attention_oracle import GRADS, INF, Case, make
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


def test_dropout_drops_its_share_independently() -> None:
    for p in (0.1, 0.5, 0.999):
        keep = kept(torch.tensor([1234567]), p, 2, 3, 100, 200).double()
        share = keep.mean().item()
        assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
        centered = keep - share
        for dim in range(4):  # neighbours along every dimension are uncorrelated
            n = keep.shape[dim] - 1
            pair = (centered.narrow(dim, 0, n) * centered.narrow(dim, 1, n)).mean() / (p * (1 - p))
            assert abs(pair.item()) < 6 / math.sqrt(keep.numel() / 2)
    same = kept(torch.tensor([7]), 0.5, 1, 1, 300, 300) == kept(torch.tensor([8]), 0.5, 1, 1, 300, 300)
    assert abs(same.double().mean().item() - 0.5) < 0.01


@each_backend
@each_dtype
@pytest.mark.parametrize("p", [0.2, 0.999])
def test_dropout_matches_the_formula_with_its_mask(backend: str, dtype: torch.dtype, p: float) -> None:
    """One mask for every backend, in forward and backward."""
    case = Case(2, 4, 2, 70, 130, 32, 32, True)
    q, k, v = make(case, dtype)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    keep = kept(seed, p, 2, 4, 70, 130)
    below = torch.ones(70, 130, dtype=torch.bool).tril()

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(32)).masked_fill(~below, -INF)
        return (x.softmax(-1) * keep / (1 - p)).to(v.dtype) @ v.repeat_interleave(2, 1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ops.attention(q, k, v, causal=True, dropout=p)

    with on(backend):
        actual, grads = differentiate(run, [q, k, v])
    oracle, oracle_grads = differentiate(dropped, [x.double() for x in (q, k, v)])
    plain, plain_grads = differentiate(dropped, [q, k, v])
    assert_all_accurate(["out"], actual, oracle, plain, FORWARD)
    assert_all_accurate(GRADS[:3], grads, oracle_grads, plain_grads, BACKWARD)


@each_backend
def test_dropout_follows_the_generator_and_checkpointing(backend: str) -> None:
    tensors = make(Case(1, 2, 2, 40, 40, 16, 16))
    run = lambda *x: ops.attention(*x, causal=True, dropout=0.3)  # noqa: E731
    with on(backend):
        torch.manual_seed(3)
        first, second = differentiate(run, tensors), differentiate(run, tensors)
        assert not torch.equal(first[0][0], second[0][0])
        torch.manual_seed(3)
        again = differentiate(run, tensors)
        torch.manual_seed(3)
        recomputed = differentiate(lambda *x: checkpoint(run, *x, use_reentrant=False), tensors)
    for other in (again, recomputed):
        assert_same_bits([*first[0], *first[1]], [*other[0], *other[1]])
