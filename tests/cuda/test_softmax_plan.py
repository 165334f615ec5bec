"""The plan of softmax (csrc/cuda/softmax.cpp): which form, how many threads and blocks a row gets on which chip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from fastlm import cuda, ops
from tests.ops.harness import BACKWARD, FORWARD, assert_all_accurate, assert_same_bits, differentiate, on

FLOAT32, BFLOAT16 = 0, 1
FEW, MANY, BLOCK, TWICE = 0, 2, 4, 6  # instances; + 1 for element by element
AT = 1 << 20  # an address that is a multiple of 16
CHIPS = {  # of which the emulation is told
    "A100": {"arch": 80, "sms": 108, "shared": 163 << 10},
    "RTX 4090": {"arch": 89, "sms": 128, "shared": 99 << 10},
    "H100": {"arch": 90, "sms": 132, "shared": 227 << 10},
}


class Launch(NamedTuple):
    variant: int
    blocks: int
    threads: int
    cluster: int
    shared: int


@contextmanager
def chip(name: str) -> Iterator[Any]:
    extension = cuda.extension()
    extension.emulate("forward", **CHIPS[name])
    try:
        yield extension
    finally:
        extension.emulate("forward")


def planned(
    m: int, n: int, *, on: str = "H100", dtype: int = BFLOAT16, backward: bool = False, x: int = AT, x_row: int = 0,
    y: int = AT,
) -> Launch:  # fmt: skip
    with chip(on) as extension:
        extension.record(True)
        try:
            if backward:
                extension.softmax_backward(dtype, False, x, x_row or n, y, AT, m, n, 0, 0)
            else:
                extension.softmax_forward(dtype, False, x, x_row or n, y, m, n, 0, 0)
            ((_, _, name, blocks, y_blocks, threads, cluster, shared),) = extension.records()
        finally:
            extension.record(False)
    assert y_blocks == 1 and name.startswith("softmax_backward_" if backward else "softmax_forward_")
    return Launch(int(name.rpartition("_")[2]), blocks, threads, cluster, shared)


def test_short_rows_share_warps() -> None:
    """bfloat16: 8 elements a word. A block of 128 threads takes 4 rows at once of as many lanes as a row has words."""
    assert planned(4096, 64)[:3] == (FEW, 4096 // (16 * 4), 128)  # 8 lanes, 16 rows side by side
    assert planned(4096, 256)[:3] == (FEW, 4096 // (4 * 4), 128)
    assert planned(4096, 64, backward=True)[:3] == (FEW, 4096 // (16 * 2), 128)
    assert planned(4096, 768)[:3] == (MANY, 4096 // 8, 128)  # 96 words: 16 lanes of up to 8
    assert planned(4096, 2048)[:3] == (MANY, 4096 // 4, 128)
    assert planned(4096, 1024, backward=True)[:3] == (MANY, 4096 // 4, 128)  # 128 words: 32 lanes of 4
    assert planned(1, 1)[:3] == (MANY, 1, 128)
    assert planned(2**33, 8).blocks == 2**33 // 512


def test_a_row_gets_a_block_where_rows_are_few() -> None:
    assert planned(4 * 132, 2048).variant == MANY
    assert planned(4 * 132 - 1, 2048) == (BLOCK, 4 * 132 - 1, 64, 1, 2048)
    assert planned(100, 16384).cluster == 1 and planned(60, 16384).cluster == 2 and planned(8, 65536).cluster == 8
    assert planned(8, 16384, on="A100") == (BLOCK, 8, 256, 1, 2048)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("n", [4096, 8192, 16384, 32768, 65536, 131072, 262144])
def test_one_read_up_to_262144_columns_on_sm_90(n: int, dtype: int, backward: bool) -> None:
    plan = planned(512, n, dtype=dtype, backward=backward)
    assert plan.variant == BLOCK and plan.blocks == 512 * plan.cluster
    width, words = (
        (
            4,
            8,
        )[dtype],
        4 if backward else 8,
    )
    held = plan.threads * plan.cluster * words * width
    stash = (plan.shared - 2048) * plan.cluster // (16 * (2 if backward else 1)) * width
    assert n <= held + stash < 2 * n + 64 * words * width
    assert plan.shared == 2048 or (backward and dtype == FLOAT32 and n == 262144)
    assert plan.threads <= 512 or plan.cluster == 8


def test_without_clusters_long_rows_wait_in_shared_memory() -> None:
    assert planned(512, 32768, on="A100") == (BLOCK, 512, 512, 1, 2048)
    assert planned(512, 65536, on="A100") == (BLOCK, 512, 1024, 1, 2048)
    assert planned(512, 65544, on="A100") == (BLOCK, 512, 1024, 1, 2048 + 16384)
    assert planned(512, 131072, on="A100") == (BLOCK, 512, 1024, 1, 2048 + 8 * 16384)
    assert planned(512, 262144, on="A100") == (TWICE, 512, 1024, 1, 2048)
    assert planned(512, 65536, on="RTX 4090", backward=True) == (TWICE, 512, 1024, 1, 2048)  # 4 words twice: 128 KB
    assert planned(512, 65536, on="A100", backward=True) == (BLOCK, 512, 1024, 1, 2048 + 8 * 16384)


def test_rows_beyond_everything_are_read_twice() -> None:
    assert planned(3, 2**22) == (TWICE, 24, 1024, 8, 2048)
    assert planned(1, 2**33) == (TWICE, 8, 1024, 8, 2048)
    assert planned(2**20, 2**20).blocks == 2**23


def test_addresses_that_differ_go_element_by_element_in_the_same_form() -> None:
    """So that sums are added in the same order; rows of whole words only, as no others are all aligned anywhere."""
    for m, n in ((4096, 64), (4096, 768), (16, 4096), (16, 65536), (16, 2**22)):
        for backward in (False, True):
            even = planned(m, n, backward=backward)
            assert even.variant % 2 == 0
            odd = even._replace(variant=even.variant + 1)
            assert planned(m, n, backward=backward, x=AT + 2) == odd
            assert planned(m, n, backward=backward, y=AT + 8) == odd
            assert planned(m, n, backward=backward, x_row=n + 1) == odd
            assert planned(m, n, backward=backward, x_row=n + 8) == even
            assert planned(1, n, backward=backward, x_row=n + 1).variant % 2 == 0  # the stride of an only row


def test_rows_that_start_anywhere_are_cut_between_their_edges() -> None:
    assert planned(4096, 1001)[:3] == (MANY, 512, 128)
    assert planned(4096, 101)[:3] == (MANY, 512, 128)  # 16 lanes: one for each element of the edges
    assert planned(4096, 50257).variant == BLOCK
    assert planned(4096, 50257, x=AT + 2, y=AT + 2).variant == BLOCK
    assert planned(4096, 50257, x=AT + 2).variant == BLOCK + 1
    assert planned(4096, 50257, x_row=50257 + 8).variant == BLOCK
    assert planned(4096, 50257, x_row=50257 + 1).variant == BLOCK + 1


def test_nothing_is_launched_for_no_elements() -> None:
    extension = cuda.extension()
    extension.record(True)
    try:
        extension.softmax_forward(BFLOAT16, False, AT, 0, AT, 0, 8, 0, 0)
        extension.softmax_backward(BFLOAT16, False, AT, 0, AT, AT, 8, 0, 0, 0)
        assert extension.records() == []
    finally:
        extension.record(False)


# --- paths of other chips, run ----------------------------------------------------------------------------------------

PATHS = [  # a chip, rows, columns: what no case of tests/ops/test_softmax.py takes
    ("A100", 2, 12000),  # a block without clusters
    ("small", 2, 40000),  # words in shared memory
    ("small", 1, 40003),
    ("tiny", 2, 40000),  # read twice
    ("tiny", 1, 40003),
    ("small H100", 1, 300_000),  # over a cluster, with words in shared memory; read twice backward
]  # fmt: skip
CHIPS |= {
    "small": {"arch": 80, "sms": 2, "shared": 132 << 10},
    "tiny": {"arch": 80, "sms": 2, "shared": 4 << 10},
    "small H100": {"arch": 90, "sms": 132, "shared": 20 << 10},
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("case", PATHS, ids=str)
def test_paths_of_other_chips(case: tuple[str, int, int], unaligned: bool, log: bool) -> None:
    name, m, n = case
    torch_function = torch.log_softmax if log else torch.softmax
    x = torch.randn(m, n + 1)[:, 1:] if unaligned else torch.randn(m, n)
    oracle, oracle_grads = differentiate(lambda x: torch_function(x, -1), [x.double()])
    eager, eager_grads = differentiate(lambda x: torch_function(x, -1), [x])
    with on("cuda-forward"), chip(name):
        actual, grads = differentiate(lambda x: ops.softmax(x, log=log), [x])
        if n % 4 == 0 and unaligned:
            outputs, again = differentiate(lambda x: ops.softmax(x, log=log), [x.clone()])
            assert_same_bits([*actual, *grads], [*outputs, *again])
    # One or two rows share the rounding of as many sums.
    assert_all_accurate(["y"], actual, oracle, eager, FORWARD, independent=False)
    assert_all_accurate(["dx"], grads, oracle_grads, eager_grads, BACKWARD, independent=False)


@pytest.mark.parametrize("shift", range(8))
def test_rows_that_start_anywhere(shift: int) -> None:
    """Every place of a row's start in its 16 bytes, with all tensors alike there, which needs raw addresses."""
    extension, m = cuda.extension(), 3
    for n in (1, 7, 9, 101, 2003):
        x, y, dy, dx = (torch.full((m * n + 16,), math.nan, dtype=torch.bfloat16) for _ in range(4))
        for tensor in (x, dy):
            tensor[shift : shift + m * n] = torch.randn(m * n)
        at = [t.data_ptr() + 2 * shift for t in (x, y, dy, dx)]
        extension.softmax_forward(BFLOAT16, False, at[0], n, at[1], m, n, 0, 0)
        extension.softmax_backward(BFLOAT16, False, at[2], n, at[1], at[3], m, n, 0, 0)
        rows = [t[shift : shift + m * n].reshape(m, n).float() for t in (x, y, dy, dx)]
        torch.testing.assert_close(rows[1], rows[0].softmax(-1), rtol=0.01, atol=1e-6)
        expected = rows[1] * (rows[2] - (rows[1] * rows[2]).sum(-1, keepdim=True))
        torch.testing.assert_close(rows[3], expected, rtol=0.01, atol=1e-5)
        for t in (y, dx):
            assert t[:shift].isnan().all() and t[shift + m * n :].isnan().all()
