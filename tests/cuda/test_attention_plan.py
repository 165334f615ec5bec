"""The plan of attention (csrc/cuda/attention.cpp): which path, kernel, tile and shared memory a call takes on which
chip; what it asks for beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import cuda, ops, use_backend
from fastlm.cuda import attention
from tests.ops.attention_oracle import near
from tests.ops.harness import assert_same_bits, differentiate, far_apart, on

CHIPS = {  # of which the emulation is told
    "A100": {"arch": 80, "sms": 108, "shared": 163 << 10, "l2": 40 << 20},
    "RTX 3090": {"arch": 86, "sms": 82, "shared": 99 << 10, "l2": 6 << 20},
    "RTX 4090": {"arch": 89, "sms": 128, "shared": 99 << 10, "l2": 72 << 20},
    "H100": {"arch": 90, "sms": 132, "shared": 227 << 10, "l2": 50 << 20},
    "B200": {"arch": 100, "sms": 148, "shared": 227 << 10, "l2": 126 << 20},
    "RTX 5090": {"arch": 120, "sms": 170, "shared": 99 << 10, "l2": 96 << 20},
}
WIDTHS = (32, 64, 96, 128, 192, 256)
each_chip = pytest.mark.parametrize("chip", CHIPS)


@contextmanager
def emulated(chip: str) -> Iterator[Any]:
    extension = cuda.extension()
    extension.emulate("forward", **CHIPS[chip])
    try:
        with use_backend("cuda"):
            yield extension
    finally:
        extension.emulate("forward")


def tensors(b: int, h: int, hk: int, s: int, t: int, d: int, dv: int = 0) -> list[Tensor]:
    return [torch.zeros(n, dtype=torch.bfloat16) for n in ((b, h, s, d), (b, hk, t, d), (b, hk, t, dv or d))]


def launched(chip: str, q: Tensor, k: Tensor, v: Tensor, backward: bool = False, **options: Any) -> dict[str, Any]:
    """Kernel -> (unit, blocks, threads, shared memory) of a call, of the backward where `backward`."""
    with emulated(chip) as extension:
        inputs = [x.requires_grad_(backward) for x in (q, k, v)]
        extension.record(True)
        try:
            out = ops.attention(*inputs, **options)
            if backward:
                extension.record(True)
                torch.autograd.grad(out, inputs, torch.zeros_like(out))
            records = extension.records()
        finally:
            extension.record(False)
    return {name: (unit, x, threads, shared) for unit, _, name, x, _, threads, _, shared in records}


def kernel(found: dict[str, Any]) -> tuple[str, Any]:
    """The one that does the work: its unit, and the rest."""
    small = ("attention_prepare", "attention_finish", "attention_clear", "document_ranges")
    ((_, (unit, *rest)),) = ((name, r) for name, r in found.items() if not name.startswith(small))
    return unit, rest


@each_chip
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("d", WIDTHS)
def test_every_call_has_a_kernel_that_fits(chip: str, d: int, backward: bool) -> None:
    """Plain and general; that the chip has the memory and the kernel is there, the emulation looks at."""
    direction = "backward" if backward else "forward"

    def verify(options: dict[str, Any], hopper: bool) -> None:
        unit, _ = kernel(launched(chip, *tensors(2, 4, 2, 130, 200, d), backward, **options))
        width = next(w for w in ((64, 128, 256) if hopper else WIDTHS) if d <= w)
        assert unit == f"attention_{'hopper' if hopper else 'ampere'}_{direction}_{width}"

    for options in ({}, {"causal": True}, {"causal": "bottom-right", "window": (9, 0)}, {"sinks": torch.zeros(4)}):
        verify(options, chip == "H100")
    documents = (torch.zeros(2, 130).int(), torch.zeros(2, 200).int())
    for options in ({"softcap": 2.0}, {"documents": documents}):
        verify(options, chip == "H100" and d <= 128 and not backward)
    mask = torch.ones(130, 200).bool()
    for options in ({"dropout": 0.1}, {"alibi_slopes": torch.ones(4)}, {"mask": mask}, {"scale": -1.0}):
        verify(options, False)


def test_the_wider_head_dim_decides() -> None:
    for d, dv, width in ((8, 40, 64), (40, 8, 64), (111, 97, 128), (1, 1, 32), (129, 1, 192), (193, 256, 256)):
        assert kernel(launched("A100", *tensors(1, 1, 1, 9, 9, d, dv)))[0] == f"attention_ampere_forward_{width}"


def test_the_path_of_sm_80_is_there_on_an_h100_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "HOPPER", False)
    for backward in (False, True):
        unit, _ = kernel(launched("H100", *tensors(1, 2, 2, 300, 300, 128), backward, causal=True))
        assert unit.startswith("attention_ampere")


def test_what_the_copy_engine_cannot_read_takes_the_other_path() -> None:
    q, *keys = tensors(1, 2, 2, 30, 40, 64)
    shared = [x.as_strided(x.shape, (0, 0, 64, 1)) for x in keys]  # one head for all
    assert kernel(launched("H100", q, *shared))[0] == "attention_ampere_forward_64"
    assert kernel(launched("H100", *tensors(1, 2, 2, 30, 0, 64)))[0] == "attention_ampere_forward_64"


def problem(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None = None) -> attention._Problem:
    """Causal, and nothing else."""
    longest = (q.shape[2], k.shape[2]) if cu is None else (1000, 1000)
    return attention._Problem(q, k, v, *[None] * 6, cu, cu, *longest, 1, -1, -1, 0.0, 1.0, 0.0)


def test_a_block_for_each_tile_of_each_head() -> None:
    inputs = tensors(3, 6, 2, 1000, 700, 128)
    with emulated("A100"):
        forward, backward = (problem(*inputs).plan(which, inputs[0].stride()) for which in (False, True))
    _, (blocks, *_rest) = kernel(launched("A100", *inputs, causal=True))
    assert forward.path == "ampere" and blocks == 3 * 6 * -(-1000 // forward.m)
    found = launched("A100", *inputs, True, causal=True)
    _, (blocks, *_rest) = kernel(found)
    assert blocks == 3 * 2 * -(-700 // backward.n)
    tiles = 3 * 6 * -(-1000 // backward.m)
    assert backward.turns == 1 + tiles and backward.dq_sum == tiles * backward.m * 128
    assert found["attention_prepare_2"][1] == 3 * 6 * 16 and found["attention_finish_2"][1] == 3 * 6 * 16


def test_packed_sequences_share_the_room_of_sums() -> None:
    """Many short ones beside a long one: a tile more for each at most."""
    lengths = [1000, *[3] * 99]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu[-1])
    inputs = tensors(1, 2, 2, total, total, 64)
    with emulated("A100"):
        plan = problem(*inputs, cu).plan(True, inputs[0].stride())
    assert plan.turns == 1 + 2 * (total // plan.m + 100) and plan.dq_sum == (plan.turns - 1) * plan.m * 64


@pytest.mark.parametrize("chip", ["A100", "H100"])
def test_more_heads_than_a_grid_has_along_y(chip: str) -> None:
    for backward in (False, True):
        assert all(x < 2**31 for _, x, *_ in launched(chip, *tensors(9000, 8, 8, 3, 3, 64), backward).values())


def test_the_last_of_70000_heads() -> None:
    q, k, v = (torch.randn(70000, 1, 1, 8).to(torch.bfloat16) for _ in range(3))
    with emulated("A100") as extension:
        extension.tail(2)
        try:
            out = ops.attention(q, k, v)
        finally:
            extension.tail(0)
    assert torch.equal(out[-2:], v[-2:]) and not torch.equal(out[-3], v[-3])


@pytest.mark.parametrize("chip", ["80", "90"])
def test_blocks_may_add_in_any_order(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever measures what turns cost: the same sums but for their order."""
    inputs = [torch.randn(1, 2, 300, 64).to(torch.float16) for _ in range(3)]
    grads = []
    for ordered in (True, False):
        monkeypatch.setattr(attention, "ORDERED", ordered)
        with on(f"cuda-reversed-{chip}"):
            grads.append(differentiate(lambda *x: ops.attention(*x, causal=True), inputs)[1])
    (first_dq, *first), (dq, *rest) = grads
    assert_same_bits(first, rest)
    torch.testing.assert_close(first_dq, dq, **near(dq.dtype))


@pytest.mark.parametrize("chip", ["80", "90"])
def test_rows_more_than_two_billion_elements_apart(chip: str) -> None:
    apart = 2**31
    near = [torch.randn(1, 1, 2, 64).to(torch.bfloat16) for _ in range(3)]
    far = [far_apart(apart + 64).as_strided((1, 1, 2, 64), (8, 8, apart, 1)).copy_(x) for x in near]
    with on(f"cuda-forward-{chip}"):
        results = [differentiate(lambda *x: ops.attention(*x, causal=True), some) for some in (near, far)]
    for a, b in zip(*([*out, *grads] for out, grads in results), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(results[0][0][0][:, :, 0], near[2][:, :, 0])
