"""The plan of the element-wise kernels (csrc/cuda/elementwise_plan.h): what the launchers of gelu and glu start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastlm
from fastlm import cuda, ops
from tests.ops.harness import far_apart

THREADS, MOST = 256, 2**30
BFLOAT16, SILU, TANH = 1, 0, 2
AT = 1 << 20  # an address that is a multiple of 16
Launch = tuple[str, int]  # kernel_variant, blocks


@contextmanager
def recorded(launches: list[Launch]) -> Iterator[Any]:
    """Notes what is launched in place of running it."""
    extension = cuda.extension()
    extension.record(True)
    try:
        yield extension
        for _, _, name, x, y, threads, cluster, shared in extension.records():
            assert (y, threads, cluster, shared) == (1, THREADS, 1, 0)
            launches.append((name, x))
    finally:
        extension.record(False)


def forward(m: int, n: int, gate: int = AT, gate_row: int = 0, up_row: int = 0, dtype: int = BFLOAT16) -> list[Launch]:
    launches: list[Launch] = []
    with recorded(launches) as extension:
        extension.glu_forward(dtype, SILU, gate, gate_row or n, AT, up_row or n, AT, m, n, 0, 0)
    return launches


def test_dense_rows_are_one_row() -> None:
    """3 rows of 1000 elements and 2 more are 375 units of 16 bytes, and 2 elements behind them."""
    assert forward(3, 1000) == [("glu_forward_1", 2)]
    assert forward(1, 3002) == [("glu_forward_1", 2)]
    assert forward(2, 1501) == [("glu_forward_1", 2)]
    assert forward(1, 7) == [("glu_forward_1", 1)]
    assert forward(3, 1000, dtype=0) == [("glu_forward_1", 3)]


def test_rows_apart_are_read_in_16_bytes_where_every_row_starts_at_them() -> None:
    assert forward(3, 1000, gate_row=2000, up_row=2000) == [("glu_forward_1", 2)]
    assert forward(3, 1000, gate_row=1004) == [("glu_forward_0", 3)]  # 1004 elements are 125.5 units
    assert forward(3, 1004, gate_row=2008) == [("glu_forward_0", 3)]  # rows would end inside a unit
    assert forward(1, 1004, gate_row=3) == [("glu_forward_1", 1)]  # the stride of an only row is no matter
    assert forward(3, 1000, gate=AT + 8) == [("glu_forward_0", 3)]


def test_nothing_is_launched_for_no_elements() -> None:
    assert forward(0, 1000) == forward(5, 0, gate_row=8) == []
    launches: list[Launch] = []
    with recorded(launches) as extension:
        extension.gelu_forward(BFLOAT16, TANH, AT, AT, 0, 0, 0)
    assert launches == []


@pytest.mark.parametrize(("kernel", "pointers", "units"), [("gelu_forward", 2, 2), ("gelu_backward", 3, 1)])
def test_gelu_over_2_to_the_31(kernel: str, pointers: int, units: int) -> None:
    launches: list[Launch] = []
    with recorded(launches) as extension:
        getattr(extension, kernel)(BFLOAT16, TANH, *[AT] * pointers, 2**31 + 4, 0, 0)
        getattr(extension, kernel)(BFLOAT16, TANH, *[AT + 2] * pointers, 2**31 + 4, 0, 0)
        getattr(extension, kernel)(BFLOAT16, TANH, *[AT] * pointers, 2**36, 0, 0)
    wide, single = [(f"{kernel}_{variant}") for variant in (5, 4)]
    assert launches == [
        (wide, 2**28 // THREADS // units),  # the 4 elements behind the last unit need no block
        *[(single, MOST // THREADS // 4)] * 2, (single, 1),
        *[(wide, MOST // THREADS // units)] * 8,
    ]  # fmt: skip


def test_glu_over_2_to_the_31() -> None:
    """An index of units keeps 31 bits, whole rows to a launch while a row has fewer."""
    assert forward(2**20, 2**14, gate_row=2**15) == [("glu_forward_1", MOST // THREADS)] * 2
    assert forward(3 * 2**17 + 1, 2**14, gate_row=2**14 + 4)[-1] == ("glu_forward_0", 2**14 // THREADS // 4)
    assert len(forward(3 * 2**17 + 1, 2**14, gate_row=2**14 + 4)) == 7
    assert forward(2, 2**34, gate_row=2**35) == [("glu_forward_1", MOST // THREADS)] * 4


def test_rows_4_gib_apart_are_launched_one_by_one() -> None:
    assert forward(3, 64, gate_row=2**31) == [("glu_forward_1", 1)] * 3
    assert forward(3, 64, gate_row=2**31 - 8) == [("glu_forward_1", 1)]


def test_rows_4_gib_apart_give_what_near_ones_do() -> None:
    gate = far_apart(2**31 + 64).as_strided((2, 24), (2**31, 1))
    near, up = torch.randn(2, 24).bfloat16(), torch.randn(2, 24).bfloat16()
    gate.copy_(near)
    with fastlm.use_backend("cuda"), torch.no_grad():
        assert torch.equal(ops.swiglu(gate, up), ops.swiglu(near, up))


def test_the_packed_form_and_its_gradients_take_16_bytes() -> None:
    launches: list[Launch] = []
    with fastlm.use_backend("cuda"):
        for n, variant in ((24, 1), (20, 0)):
            x = torch.randn(3, 2 * n, dtype=torch.bfloat16, requires_grad=True)
            with recorded(launches):
                ops.swiglu(x).backward(torch.ones(3, n, dtype=torch.bfloat16))
            assert launches == [(f"glu_forward_{variant}", 1), (f"glu_backward_{variant}", 1)]
            launches.clear()
