"""The plan of rope (csrc/cuda/rope.cpp): instance, heads of a thread, grid, launches; and every way to read a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import cuda, ops
from tests.ops.harness import far_apart

FLOAT32, BFLOAT16 = 0, 1
SINGLES, HALVES, INTERLEAVED = "rope_0", "rope_1", "rope_2"
THREADS, SMS = 256, 132
AT = 1 << 20  # an address that is a multiple of 16


@pytest.fixture(autouse=True)
def large_chip() -> Iterator[None]:
    cuda.extension().emulate("forward", sms=SMS)
    yield
    cuda.extension().record(False)
    cuda.extension().emulate("forward")


def launches(
    b: int, h: int, hk: int, s: int, d: int, r: int | None = None, *, interleaved: bool = False, dtype: int = BFLOAT16,
    at: int = AT, batch: int | None = None, head: int | None = None, position: int | None = None,
) -> list[tuple[str, int]]:  # fmt: skip
    """Instance and blocks of each launch, for q whose strides are those of (B, S, H, D) unless given."""
    extension = cuda.extension()
    extension.record(True)
    strides = (
        s * h * d if batch is None else batch,
        d if head is None else head,
        h * d if position is None else position,
    )
    q = (at, *strides, AT, True, h)
    k = (AT, s * hk * d, d, hk * d, AT, True, hk) if hk else (0, 0, 0, 0, 0, False, 0)
    r = d if r is None else r
    extension.rope(dtype, *q, *k, FLOAT32, AT, AT, 0, r // 2, b, s, d, r, interleaved, False, 0, 0)
    recorded = extension.records()
    extension.record(False)
    assert all((y, threads, cluster, shared) == (1, THREADS, 1, 0) for *_, y, threads, cluster, shared in recorded)
    return [(name, x) for _, _, name, x, *_ in recorded]


@pytest.mark.parametrize(
    ("h", "hk", "groups"),
    [(32, 8, 4 + 1), (12, 12, 2 + 2), (16, 2, 2 + 1), (71, 1, 9 + 1), (9, 3, 2 + 1), (1, 1, 1 + 1), (40, 0, 5)],
)
def test_up_to_eight_heads_share_a_thread_in_even_shares(h: int, hk: int, groups: int) -> None:
    """128 channels of bfloat16 are 8 units of two places of 16 bytes."""
    assert launches(8, h, hk, 2048, 128) == [(HALVES, 8 * 2048 * 8 // THREADS * groups)]


def test_fewer_heads_where_the_grid_would_not_fill_the_chip() -> None:
    assert launches(1, 32, 8, 1, 128) == [(HALVES, 16 + 4)]  # one position: two heads a thread
    assert launches(1, 32, 8, 4096, 128) == [(HALVES, 128 * (8 + 2))]  # four: 1280 blocks are two waves of 132 * 4
    assert launches(1, 32, 8, 8192, 128) == [(HALVES, 256 * (4 + 1))]
    assert launches(1, 3, 1, 5, 64) == [(HALVES, 2 + 1)]
    cuda.extension().emulate("forward", sms=16)
    assert launches(1, 32, 8, 4096, 128) == [(HALVES, 128 * (4 + 1))]


def test_16_bytes_where_every_place_allows() -> None:
    assert launches(2, 4, 2, 8, 64)[0][0] == HALVES
    assert launches(2, 4, 2, 8, 64, interleaved=True)[0][0] == INTERLEAVED
    assert launches(2, 4, 2, 8, 64, 32)[0][0] == HALVES
    assert launches(2, 4, 2, 8, 8, dtype=FLOAT32)[0][0] == HALVES
    for interleaved in (False, True):
        for other in (
            launches(2, 4, 2, 8, 64, 24, interleaved=interleaved),  # R/2 is no multiple of 8 elements
            launches(2, 4, 2, 8, 60, 32, interleaved=interleaved),
            launches(2, 4, 2, 8, 64, at=AT + 2, interleaved=interleaved),
            launches(2, 4, 2, 8, 64, batch=2052, interleaved=interleaved),
            launches(2, 4, 2, 8, 64, head=68, interleaved=interleaved),
            launches(2, 4, 2, 8, 64, position=260, interleaved=interleaved),
        ):
            assert other[0][0] == SINGLES


def test_strides_of_single_batches_heads_and_positions_are_no_matter() -> None:
    assert launches(1, 1, 1, 1, 64, batch=3, head=5, position=7)[0][0] == HALVES


def test_channels_behind_r_are_further_units() -> None:
    """96 channels of bfloat16: 2 units turn 32, 4 copy 64; 72: 2 and 3 (of 5 places, the last of one)."""
    assert launches(64, 8, 0, 2048, 96, 32) == [(HALVES, 64 * 2048 * (2 + 4) // THREADS)]
    assert launches(64, 8, 0, 2048, 72, 32) == [(HALVES, 64 * 2048 * (2 + 3) // THREADS)]
    assert launches(64, 8, 0, 2048, 64, 0) == [(HALVES, 64 * 2048 * 4 // THREADS)]
    assert launches(16, 8, 0, 2048, 31, 30) == [(SINGLES, 16 * 2048 * (15 + 1) // THREADS)]


def test_nothing_is_launched_for_no_elements() -> None:
    assert (
        launches(0, 2, 1, 3, 8) == launches(2, 2, 1, 0, 8) == launches(2, 0, 0, 3, 8) == launches(2, 1, 1, 3, 0) == []
    )


def test_over_2_to_the_31_elements_and_blocks() -> None:
    most = 2**30 // THREADS
    assert launches(2**16, 8, 0, 2**12, 128) == [(HALVES, most)] * 2  # whole batches: 2**27 positions of 8 units
    assert launches(1, 1, 0, 2**28, 128) == [(HALVES, most)] * 2  # of one batch some positions
    assert launches(3, 1, 0, 2**27 + 32, 128) == [(HALVES, most), (HALVES, 1)] * 3
    blocks = [x for _, x in launches(8, 70_000, 70_000, 4096, 128)]
    assert len(blocks) == 1 and blocks[0] == 8 * 4096 * 8 // THREADS * 2 * 8750
    blocks = [x for _, x in launches(8, 70_000, 70_000, 2**17, 128)]
    assert sum(blocks) == 8 * 2**17 * 8 // THREADS * 2 * 8750 and max(blocks) < 2**31


def test_positions_4_gib_apart_give_what_near_ones_do() -> None:
    near = torch.randn(1, 1, 2, 32).bfloat16()
    far = far_apart(2**31 + 64).as_strided((1, 1, 2, 32), (1, 1, 2**31, 1))
    far.copy_(near)
    angles = torch.randn(2, 16)
    with fastlm.use_backend("cuda"), torch.no_grad():
        assert torch.equal(
            ops.rope(far, None, angles.cos(), angles.sin()), ops.rope(near, None, angles.cos(), angles.sin())
        )


def shifted(table: Tensor) -> Tensor:
    """The same table, one element behind a multiple of 16 bytes, with rows one element longer."""
    return torch.nn.functional.pad(table, (1, 0))[..., 1:]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_way_to_read_a_table_gives_the_same_bits(dtype: torch.dtype, interleaved: bool) -> None:
    q, k = torch.randn(2, 5, 3, 48).to(dtype), torch.randn(2, 2, 3, 48).to(dtype)
    for shape, table_dtype in product([(3, 16), (2, 3, 16)], [torch.float32, torch.bfloat16, torch.float16]):
        angles = torch.randn(shape)
        cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
        with fastlm.use_backend("cuda"), torch.no_grad():
            expected = ops.rope(q, k, cos.float(), sin.float(), interleaved=interleaved)
            for c, s in [
                (cos, sin), (shifted(cos), shifted(sin)), (cos, shifted(sin)), (cos.float(), sin), (cos, sin.double()),
            ]:  # fmt: skip
                actual = ops.rope(q, k, c, s, interleaved=interleaved)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            odd = ops.rope(shifted(q), shifted(k), cos, sin, interleaved=interleaved)  # element by element
            assert all(torch.equal(a, b) for a, b in zip(odd, expected, strict=True))
