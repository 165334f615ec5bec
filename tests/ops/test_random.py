"""The bits of dropout: the Triton kernels' against the reference's, bit for bit, and what they are like."""

from __future__ import annotations

import pytest
import torch

from fastlm.reference import _random
from tests.ops.harness import KERNELS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
random = pytest.importorskip("fastlm.kernels._random")
launch = pytest.importorskip("fastlm.kernels._launch").launch

PROBABILITIES = [0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-12]
SEEDS = [0, 1, 1234567, 2**63 - 2]


@triton.jit
def _mask(seed, first, out, column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    low, high = random.row_keys(tl.load(seed), rows + tl.load(first))
    columns = tl.arange(0, COLUMNS)
    keep = random.kept(low[:, None], high[:, None], (column + columns)[None, :], threshold)
    tl.store(out + rows[:, None] * COLUMNS + columns[None, :], keep.to(tl.int8))


def mask(seed: int, dropout: float, row: int, column: int, rows: int, columns: int) -> torch.Tensor:
    out = torch.empty(rows, columns, dtype=torch.int8)
    numbers = torch.tensor([seed]), torch.tensor([row]), out, column
    launch(_mask, (1,), *numbers, random.threshold(dropout), ROWS=rows, COLUMNS=columns)
    return out.bool()


@pytest.mark.parametrize("backend", [b for b in KERNELS if b == "triton"])
@pytest.mark.parametrize("dropout", PROBABILITIES)
def test_the_kernels_make_the_mask_of_the_reference(backend: str, dropout: float) -> None:
    for seed in SEEDS:
        expected = _random.kept(torch.tensor([seed]), dropout, 16 + 4, torch.arange(3, 3 + 256))
        assert torch.equal(mask(seed, dropout, 4, 3, 16, 256), expected[4:])


@pytest.mark.parametrize("backend", [b for b in KERNELS if b == "triton"])
def test_rows_past_2_to_the_32(backend: str) -> None:
    """The number of a row enters the hash in 64 bits; its key is that of the first row with the seed moved on."""
    step = 0x9E3779B97F4A7C15
    for row in (2**31, 2**32 + 5, 2**40):
        seed = (1234567 + row * step) % 2**64
        moved = seed - 2**64 if seed >= 2**63 else seed
        expected = _random.kept(torch.tensor([moved]), 0.5, 2, torch.arange(64))
        assert torch.equal(mask(1234567, 0.5, row, 0, 2, 64), expected)
