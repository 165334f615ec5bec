"""Fragments, loads and stores of matrices, swizzled tiles: the products that kernels make of them are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.test_emulation import each_order, run

HALVES = [(1, torch.bfloat16), (2, torch.float16)]
ALONG = {32: 0, 64: 1, 96: 2, 128: 3, 192: 4, 256: 5}
ACROSS = {64: 6, 128: 7, 192: 8, 512: 9}
ROUND_TRIPS = {(False, False): 10, (True, True): 11, (True, False): 12, (False, True): 13}
MISALIGNED, PAST_THE_END, IN_A_BRANCH, TURNS, WRONG_TURNS = 14, 15, 16, 17, 18
PLACES = {32: 20, 64: 21, 128: 22, 192: 23, 256: 24, 384: 25, 512: 26}


def probe(order: str, variant: int, given: Tensor, out: Tensor, dtype: int = 1, **options: int) -> None:
    run(order, variant, given, out, op="probe_mma", dtype=dtype, **options)


def numbers(*shape: int, kind: torch.dtype) -> Tensor:
    return torch.randn(shape).to(kind)


@each_order
@pytest.mark.parametrize(("dtype", "kind"), HALVES)
@pytest.mark.parametrize("k", ALONG)
@pytest.mark.parametrize("there", [32, 19])
def test_products_along_rows(order: str, dtype: int, kind: torch.dtype, k: int, there: int) -> None:
    a, b, out = numbers(32, k, kind=kind), numbers(32, k, kind=kind), torch.empty(32, 32)
    given = torch.cat([a, b[:there]])  # what is not there must not be read either
    probe(order, ALONG[k], given, out, dtype, threads=64, shared=2 * 32 * 2 * k, n=there)
    b[there:] = 0
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@each_order
@pytest.mark.parametrize(("dtype", "kind"), HALVES)
@pytest.mark.parametrize("width", ACROSS)
def test_products_across_rows_of_rounded_products(order: str, dtype: int, kind: torch.dtype, width: int) -> None:
    a, b = torch.randint(-2, 3, (2, 32, 32)).to(kind)  # the first product is exact, so its rounding is the only one
    v, out = numbers(32, width // 2, kind=kind), torch.empty(width // 64, 32, 32)
    given = torch.cat([a.flatten(), b.flatten(), v.flatten()])
    probe(order, ACROSS[width], given, out, dtype, threads=64, shared=2 * 32 * 64 + 32 * width)
    want = (a.float() @ b.float().T).to(kind).float() @ v.float()
    torch.testing.assert_close(out.transpose(0, 1).reshape(32, -1), want, rtol=1e-5, atol=1e-4)


@each_order
@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_matrices_through_registers(order: str, way: tuple[bool, bool]) -> None:
    x = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    y = torch.empty_like(x)
    probe(order, ROUND_TRIPS[way], x, y, threads=32)
    assert torch.equal(y, x if way[0] == way[1] else x.mT)


@pytest.mark.parametrize("width", PLACES)
def test_a_phase_reads_eight_groups_of_banks(width: int) -> None:
    rows, chunks = 64, width // 16
    places = torch.empty(rows, chunks, dtype=torch.int32)
    probe("forward", PLACES[width], places, places, dtype=0, threads=32, n=rows)
    assert torch.equal(places.flatten().sort().values, torch.arange(0, rows * width, 16, dtype=torch.int32))
    assert torch.equal(places // width, torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, chunks))
    groups = (places // 16 % 8).view(rows // 8, 8, chunks)  # a phase: 8 rows, one chunk
    want = torch.arange(8, dtype=torch.int32).view(1, 8, 1).expand(rows // 8, 8, chunks)
    assert torch.equal(groups.sort(dim=1).values, want)


@pytest.mark.parametrize(
    ("variant", "n", "match"),
    [(MISALIGNED, 0, "no multiple of 16"), (PAST_THE_END, 1024, "outside the block's shared memory"),
     (PAST_THE_END, 1 << 20, "outside the block's shared memory"), (IN_A_BRANCH, 0, "never reach|returned before"),
     (WRONG_TURNS, 0, "a turn that no started block will give: 1, now 0")],
)  # fmt: skip
def test_wrong_kernels_are_errors(variant: int, n: int, match: str) -> None:
    x = torch.zeros(256)
    with pytest.raises(RuntimeError, match=match):
        probe("forward", variant, x, x, threads=32, blocks=2, n=n)


@each_order
def test_blocks_take_turns(order: str) -> None:
    turn = torch.zeros(2, dtype=torch.int32)
    probe(order, TURNS, turn, turn, threads=32, blocks=5)
    assert turn.tolist() == [5 * 32, 5 * 32]
