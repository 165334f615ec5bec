"""What the launchers of cross_entropy start (csrc/cuda/cross_entropy.cpp), and each chip's way through the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fastlm import cuda
from fastlm.cuda import cross_entropy
from tests.ops.harness import far_apart

FLOAT32, BFLOAT16 = 0, 1
AT = 1 << 20  # an address that is a multiple of 16
ROOM, ROUND = 256, 16 << 10
"""Bytes before the logits; of a round of 512 threads with two words of 16 bytes each."""
CHIPS = {
    "a100": {"arch": 80, "sms": 108, "shared": 163 << 10, "shared_sm": 164 << 10, "l2": 40 << 20},
    "rtx3090": {"arch": 86, "sms": 82, "shared": 99 << 10, "shared_sm": 100 << 10, "l2": 6 << 20},
    "rtx4090": {"arch": 89, "sms": 128, "shared": 99 << 10, "shared_sm": 100 << 10, "l2": 72 << 20},
    "h200": {"arch": 90, "sms": 132, "shared": 227 << 10, "shared_sm": 228 << 10, "l2": 50 << 20},
    "b200": {"arch": 100, "sms": 148, "shared": 227 << 10, "shared_sm": 228 << 10, "l2": 126 << 20},
    "rtx5090": {"arch": 120, "sms": 170, "shared": 99 << 10, "shared_sm": 100 << 10, "l2": 96 << 20},
}


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    cluster: int
    shared: int


@contextmanager
def on(chip: str, **other: int) -> Iterator[Any]:
    extension = cuda.extension()
    extension.emulate("forward", **{**CHIPS[chip], **other})
    try:
        yield extension
    finally:
        extension.emulate("forward")


def launches(extension: Any, function: str, *arguments: Any) -> list[Launch]:
    extension.record(True)
    try:
        getattr(extension, function)(*arguments, 0, 0)
        found = extension.records()
    finally:
        extension.record(False)
    assert all(y == 1 for _, _, _, _, y, *_ in found)
    return [Launch(name.removeprefix("cross_entropy_"), x, *rest) for _, _, name, x, _, *rest in found]


def forward(
    chip: str, m: int, v: int, dtype: int = BFLOAT16, gradient: bool = True, mean: bool = True, reduced: bool = True,
    weight: int = 0, smoothing: float = 0.0, softcap: float = 0.0,
) -> list[Launch]:  # fmt: skip
    with on(chip) as extension:
        return launches(
            extension, "cross_entropy_forward", dtype, AT, v, AT, 1, weight, 0, -100, mean, reduced, smoothing, 0.0,
            softcap, AT, AT, AT if gradient else 0, v, AT, m, v,
        )  # fmt: skip


def backward(chip: str, m: int, v: int, dtype: int = BFLOAT16, mean: bool = False) -> list[Launch]:
    with on(chip) as extension:
        return launches(
            extension, "cross_entropy_backward", dtype, AT, 1, AT, v, AT, 1, 0, 0, -100, mean, 0.0, 0.0, 0.0, AT, AT,
            v, AT, m, v,
        )  # fmt: skip


# --- which kernels ---------------------------------------------------------------------------------------------------


def test_two_launches_for_a_scalar_and_one_for_rows() -> None:
    assert [x.kernel for x in forward("h200", 64, 65)] == ["prepare_0", "narrow_0"]
    assert [x.kernel for x in forward("h200", 64, 65, mean=False)] == ["prepare_0", "narrow_0"]
    assert [x.kernel for x in forward("h200", 64, 65, mean=False, reduced=False)] == ["narrow_0"]
    rows = {"mean": False, "reduced": False, "smoothing": 0.1}
    assert [x.kernel for x in forward("h200", 64, 65, **rows)] == ["narrow_2"]
    assert [x.kernel for x in forward("h200", 64, 65, weight=AT, **rows)] == ["prepare_0", "narrow_2"]
    assert [x.kernel for x in backward("h200", 64, 65)] == ["narrow_0"]
    assert [x.kernel for x in backward("h200", 64, 65, mean=True)] == ["prepare_0", "narrow_0"]


@pytest.mark.parametrize(
    ("v", "dtype", "kernel"),
    [
        (1, BFLOAT16, "narrow_0"), (256, BFLOAT16, "narrow_0"), (257, BFLOAT16, "narrow_1"),
        (1024, BFLOAT16, "narrow_1"), (1025, BFLOAT16, "wide_0"), (128, FLOAT32, "narrow_0"),
        (129, FLOAT32, "narrow_1"), (512, FLOAT32, "narrow_1"), (513, FLOAT32, "wide_0"),
    ],
)  # fmt: skip
def test_rows_of_2_KB_are_held_in_registers(v: int, dtype: int, kernel: str) -> None:
    assert forward("h200", 1000, v, dtype)[1].kernel == kernel
    general = kernel[:-1] + str(int(kernel[-1]) + 2)
    assert forward("h200", 1000, v, dtype, softcap=9.0)[1].kernel == general


@pytest.mark.parametrize(
    ("v", "dtype", "rows"),
    [(1, 1, 256), (8, 1, 256), (9, 1, 128), (65, 1, 16), (256, 1, 8), (257, 1, 16), (1024, 1, 8), (65, 0, 8)],
)
def test_rows_of_a_narrow_block(v: int, dtype: int, rows: int) -> None:
    """A lane holds up to 1 or 4 words of 16 bytes, a row a power of two of lanes, a block 256."""
    assert forward("h200", 16384, v, dtype)[1] == (forward("h200", 1, v, dtype)[1].kernel, 16384 // rows, 256, 1, 32)
    assert forward("h200", 16385, v, dtype)[1].blocks == 16384 // rows + 1


@pytest.mark.parametrize(
    ("m", "v", "blocks"), [(1, 65, 1), (4096, 65, 1), (4097, 65, 2), (8, 50304, 13), (1 << 24, 65, 128)]
)
def test_blocks_that_sum_weights(m: int, v: int, blocks: int) -> None:
    assert forward("h200", m, v)[0] == ("prepare_0", blocks, 512, 1, 64)


# --- how rows are split and kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "v", "dtype", "cluster", "threads", "shared"),
    [
        ("h200", 2048, BFLOAT16, 1, 64, 4096),
        ("h200", 8192, BFLOAT16, 1, 128, ROUND),
        ("h200", 16384, BFLOAT16, 1, 256, 32768),
        ("h200", 50304, BFLOAT16, 1, 512, 7 * ROUND),
        ("h200", 57344, BFLOAT16, 1, 512, 7 * ROUND),
        ("h200", 65536, BFLOAT16, 2, 256, 4 * ROUND),
        ("h200", 128256, BFLOAT16, 4, 256, 4 * ROUND),
        ("h200", 262144, BFLOAT16, 8, 256, 4 * ROUND),
        ("h200", 50304, FLOAT32, 2, 512, 7 * ROUND),
        ("h200", 128256, FLOAT32, 8, 256, 4 * ROUND),
        ("h200", 1 << 20, FLOAT32, 8, 512, 14 * ROUND),  # 512 KB a block: one an SM, eleven rounds stay
        ("b200", 50304, BFLOAT16, 1, 512, 7 * ROUND),
        ("b200", 128256, BFLOAT16, 4, 256, 4 * ROUND),
        ("rtx5090", 16384, BFLOAT16, 1, 256, 2 * ROUND),
        ("rtx5090", 50304, BFLOAT16, 4, 256, 2 * ROUND),
        ("rtx5090", 128256, BFLOAT16, 8, 256, 2 * ROUND),
        ("rtx5090", 128256, FLOAT32, 8, 256, 3 * ROUND),
        ("a100", 32768, BFLOAT16, 1, 256, 4 * ROUND),
        ("a100", 50304, BFLOAT16, 1, 512, 7 * ROUND),  # two rows an SM would not stay in L2: all of one is kept
        ("a100", 128256, BFLOAT16, 1, 512, 10 * ROUND),
        ("rtx3090", 50304, BFLOAT16, 1, 512, 6 * ROUND),
        ("rtx4090", 50304, BFLOAT16, 1, 512, 3 * ROUND),  # L2 holds two rows an SM: read again from there
        ("rtx4090", 128256, BFLOAT16, 1, 512, 6 * ROUND),
    ],
)
def test_long_rows(chip: str, v: int, dtype: int, cluster: int, threads: int, shared: int) -> None:
    launch = forward(chip, 8192, v, dtype)[1]
    assert launch == ("wide_0", 8192 * cluster, threads, cluster, ROOM + shared)


@pytest.mark.parametrize("chip", ["h200", "b200"])
@pytest.mark.parametrize("v", [16384, 32000, 32768, 50257, 50304, 57344, 65536, 128256, 151936, 229376])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_two_rows_are_whole_in_shared_memory(chip: str, v: int, dtype: int) -> None:
    """So that one is read while the other is written, and nothing is read twice."""
    launch, row = forward(chip, 8192, v, dtype)[1], v * (4 if dtype == FLOAT32 else 2)
    assert launch.shared - ROOM >= row // 16 * 16 // launch.cluster
    assert 2 * (launch.shared + 1024) <= CHIPS[chip]["shared_sm"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("v", [1025, 4099, 50257, 128256, 1 << 20])
def test_one_pass_needs_the_ring_alone(chip: str, v: int) -> None:
    """Loss without gradient, and gradient from statistics: three rounds on their way.

    The loss takes the blocks that it takes with a gradient, for the same bits; the gradient needs no cluster.
    """
    for launch in (forward(chip, 8192, v, gradient=False)[1], backward(chip, 8192, v)[0]):
        assert launch.shared <= ROOM + 3 * 32 * launch.threads
    assert forward(chip, 8192, v, gradient=False)[1][:4] == forward(chip, 8192, v)[1][:4]
    assert backward(chip, 8192, v)[0].blocks == 8192 and backward(chip, 8192, v)[0].cluster == 1


def test_few_rows_are_split() -> None:
    assert forward("h200", 1, 128256)[1][1:4] == (8, 256, 8)
    assert forward("h200", 40, 50304)[1][1:4] == (160, 256, 4)
    assert forward("h200", 1, 1032)[1][1:4] == (1, 64, 1)  # 129 words are too few
    assert forward("a100", 1, 128256)[1][1:4] == (1, 512, 1)
    assert backward("a100", 1, 128256)[0][1:4] == (8, 256, 1)  # needs no exchange, so no cluster


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", CHIPS)
def test_more_than_2_31_elements(chip: str) -> None:
    """The grid is along x, whose limit is 2^31 - 1 blocks; check_grid() has seen every launch here."""
    for m, v in [(1 << 17, 50304), (1 << 26, 65), (1 << 31, 7), (20000, 128256), (3, (1 << 31) - 65536)]:
        for launch in [*forward(chip, m, v), *forward(chip, m, v, gradient=False), *backward(chip, m, v)]:
            assert 0 < launch.blocks < 1 << 31 and launch.shared <= CHIPS[chip]["shared"]


def test_too_many_classes() -> None:
    for v in (0, 1 << 31):
        with pytest.raises(ValueError, match=f"cross_entropy takes 1 to 2147418112 classes, got {v}"):
            forward("h200", 3, v)


def test_no_rows() -> None:
    """prepare alone, which writes what the mean of nothing is."""
    assert [x.blocks for x in forward("h200", 0, 50304)] == [13, 0]
    assert [x.blocks for x in forward("h200", 0, 65)] == [1, 0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("v", [65, 5000])
def test_rows_beyond_2_31_elements(v: int, in_place: bool) -> None:
    logits = far_apart((1 << 31) + v).as_strided((2, v), (1 << 31, 1))
    values = torch.randn(2, v).bfloat16()
    logits.copy_(values)
    target = torch.tensor([3, 5])
    leaf = values.double().requires_grad_()
    want = F.cross_entropy(leaf, target)
    want.backward()
    loss, _, dlogits = cross_entropy.forward(
        logits, target, None, -100, "mean", 0.0, 0.0, None, True, logits if in_place else None
    )
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
    made = logits if in_place else dlogits
    torch.testing.assert_close(made.double(), leaf.grad, rtol=1e-2, atol=1e-6)


# --- each chip's way through the kernels -----------------------------------------------------------------------------

SMALL = {"sms": 1, "l2": 0}  # few multiprocessors: rows enough for all
PATHS = [
    *((chip, {"sms": 1}, (2, 50257), dtype) for chip in CHIPS if chip != "b200" for dtype in (FLOAT32, BFLOAT16)),
    ("h200", {"sms": 1}, (1, 128256), BFLOAT16),
    ("h200", {}, (1, 9000), BFLOAT16),
    # Two and no rounds of seven that stay beside the ring.
    ("a100", {**SMALL, "shared": 82 << 10, "shared_sm": 83 << 10}, (2, 50257), BFLOAT16),
    ("a100", {**SMALL, "shared": 50 << 10, "shared_sm": 51 << 10}, (2, 50304), BFLOAT16),
    ("rtx5090", {**SMALL, "shared": 50 << 10, "shared_sm": 51 << 10}, (1, 300_000), BFLOAT16),
]


@pytest.mark.parametrize(("chip", "other", "size", "dtype"), PATHS, ids=str)
def test_every_chip(chip: str, other: dict[str, int], size: tuple[int, int], dtype: int) -> None:
    """Loss and gradient at once, in place, from statistics; rows that begin on other bytes than their gradient's."""
    m, v = size
    storage = (torch.randn(m, v + 5) * 3).to(torch.bfloat16 if dtype == BFLOAT16 else torch.float32)
    target = torch.randint(v, (m,))
    target[-1] = v - 1
    weight = torch.rand(v).bfloat16()
    for logits, softcap, smoothing in ((storage[:, 2 : v + 2].clone(), None, 0.0), (storage[:, 2 : v + 2], 20.0, 0.1)):
        options = (target, weight, -100, "mean", smoothing, 0.0, softcap)
        leaf = logits.double().requires_grad_()
        z = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
        want = F.cross_entropy(z, target, weight.double(), label_smoothing=smoothing)
        want.backward()
        with on(chip, **other):
            loss, stats, dlogits = cross_entropy.forward(logits, *options, True)
            alone = cross_entropy.forward(logits, *options, False)
            again = cross_entropy.backward(torch.ones(()), logits, *options, stats)
            rows = logits.clone()
            cross_entropy.forward(rows, *options, True, rows)
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-5)
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(dlogits.double(), leaf.grad, rtol=1e-2, atol=1e-5 * scale)
        assert torch.equal(loss, alone[0]) and torch.equal(stats, alone[1])
        assert torch.equal(dlogits, again)
        torch.testing.assert_close(rows, dlogits, rtol=1e-2, atol=1e-5 * scale)
