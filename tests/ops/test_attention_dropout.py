"""attention's dropout: one mask for every backend, in forward, backward and recomputation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.reference.attention import kept
from tests.ops.attention_oracle import (
    SEED,
    Case,
    compare,
    each_backend,
    each_pair,
    finest,
    formula,
    make,
    make_problem,
)
from tests.ops.harness import assert_same_bits, differentiate, on


def test_drops_its_share_independently() -> None:
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


CASES = [
    Case(2, 4, 2, 70, 130, 32, 32, True, dropout=0.2),
    Case(2, 4, 2, 70, 130, 32, 32, True, dropout=0.95),
    Case(1, 2, 1, 65, 97, 40, 24, "bottom-right", "float (H,S,T)", dropout=0.5),
    Case(2, 2, 2, 70, 66, 16, 16, True, "", None, (20, 0), 3.0, "BH", "float32", "pair", dropout=0.3),
]


@each_pair
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_formula_with_its_mask(backend: str, dtype: torch.dtype, case: Case) -> None:
    """One mask for every backend, in forward and backward."""
    compare(backend, case, dtype)


@each_backend
def test_nearly_everything_dropped(backend: str) -> None:
    """Few terms a thousand times as large: too few for the mean of their errors to say anything."""
    dtype = finest(backend)
    problem = make_problem(Case(2, 4, 2, 70, 130, 32, 32, True, dropout=0.999), dtype)

    def run(*tensors: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(SEED)
        return ops.attention(*tensors, **options)

    with on(backend):
        (out,), grads = problem.run(run)
    (oracle,), oracle_grads = problem.run(lambda *x, **o: formula(*x, **o)[0], torch.float64)
    for actual, want in zip([out, *grads], [oracle, *oracle_grads], strict=True):
        rtol, atol = (1e-4, 1e-5) if dtype is torch.float32 else (2e-3, 2e-3)
        torch.testing.assert_close(actual.double(), want, rtol=rtol, atol=atol * want.abs().max().item())


@each_backend
def test_follows_the_generator_and_checkpointing(backend: str) -> None:
    tensors = make(Case(1, 2, 2, 40, 40, 16, 16), finest(backend))
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
