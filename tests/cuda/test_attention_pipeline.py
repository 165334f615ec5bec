"""Attention's kernels as they ran here, in every order they might run in: barriers and stages of a block by
tests/pipeline.py, and the turns in which blocks of the backward add to dq."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch

from fastlm import cuda, ops, use_backend
from tests import emulation
from tests.pipeline import Event, Fault, Traced, blocks, check, programs


@pytest.fixture(autouse=True)
def default_chip() -> Iterator[None]:
    yield
    cuda.extension().trace(False)
    cuda.extension().emulate("forward")


class Shape(NamedTuple):
    D: int
    S: int
    T: int
    H: int = 1
    Hk: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012  never written to

    def __str__(self) -> str:
        lengths = f"{self.D}-{self.S}x{self.T}-{self.H}:{self.Hk}"
        return "-".join([lengths, *(name for name in self.options if name not in ("cu_seqlens_k", "max_seqlen_k"))])


def traced(shape: Shape, direction: str, arch: int) -> list[list[Traced]]:
    """Blocks of attention's large kernels: what goes through shared memory asynchronously."""
    torch.manual_seed(0)
    d, s, t, h, hk, options = shape
    packed = "cu_seqlens_q" in options
    heads = lambda n, length: (length, n, d) if packed else (1, n, length, d)  # noqa: E731
    q, k, v = (torch.randn(heads(*size)).bfloat16().requires_grad_() for size in ((h, s), (hk, t), (hk, t)))
    extension = cuda.extension()
    extension.emulate("forward", arch=arch, sms=2)
    extension.trace(direction == "forward")
    with use_backend("cuda"):
        out = (ops.attention_varlen if packed else ops.attention)(q, k, v, **options)
        if direction == "backward":
            extension.trace(True)
            torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    found = extension.traces()
    extension.trace(False)
    return [block for block in blocks(found) if any(line[2] in ("load", "copy") for line in block)]


def packed(*lengths: int) -> dict[str, Any]:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}


CAUSAL, END = {"causal": True}, {"causal": "bottom-right"}
FORWARD = [
    *(Shape(64, 192, 128 * n) for n in range(1, 6)),  # of three groups
    *(Shape(128, 128, 176 * n) for n in range(1, 4)),
    *(Shape(256, 128, 80 * n) for n in range(1, 4)),
    Shape(64, 576, 200, 1, 1, CAUSAL),  # several tiles of queries a block
    Shape(128, 300, 300, 1, 1, CAUSAL),
    Shape(256, 384, 160, 1, 1, END),
    Shape(64, 100, 256, 4, 2),  # two heads in a tile
    Shape(128, 300, 300, 2, 1, {"window": (60, 10)}),
    Shape(64, 300, 300, 1, 1, packed(130, 1, 169)),
]
BACKWARD = [
    *(Shape(64, 128 * n, 128) for n in range(1, 6)),
    *(Shape(128, 64 * n, 128) for n in range(1, 6)),
    *(Shape(256, 64 * n, 64) for n in range(1, 6)),
    Shape(64, 300, 300, 1, 1, CAUSAL),
    Shape(128, 150, 300, 2, 1, END),
    Shape(128, 200, 200, 1, 1, {"window": (60, 10)}),
    Shape(256, 130, 130, 2, 1, CAUSAL),
    Shape(256, 150, 150, 1, 1, packed(70, 1, 79)),
    Shape(64, 300, 300, 1, 1, packed(130, 1, 169) | CAUSAL),
]
AMPERE = [Shape(64, 200, 300), Shape(64, 200, 200, 1, 1, CAUSAL), Shape(64, 130, 130, 1, 1, {"softcap": 20.0})]


def verify(shape: Shape, direction: str, arch: int) -> list[int]:
    found = [check(*programs(block)) for block in traced(shape, direction, arch)]
    assert found
    return found


@pytest.mark.parametrize("shape", FORWARD, ids=str)
def test_forward_of_hopper(shape: Shape) -> None:
    assert min(verify(shape, "forward", 90)) > 20


@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_backward_of_hopper(shape: Shape) -> None:
    assert min(verify(shape, "backward", 90)) > 20


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", AMPERE, ids=str)
def test_ampere(shape: Shape, direction: str) -> None:
    verify(shape, direction, 80)


def left_out(events: list[Event]) -> Iterator[list[Event]]:
    """Without one step that others wait for, or that waits for them: of each kind and barrier one from the middle."""
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    parity: dict[int, int] = {}
    for i, event in enumerate(events):
        if event.what == "wait" and parity.get(event.a) == event.b:
            continue  # once more for a phase that is over
        if event.what == "wait":
            parity[event.a] = event.b
        if event.what in ("wait", "expect", "named_sync", "named_arrive", "fence_async"):
            places[event.what, event.a].append(i)
    for found in places.values():
        if len(found) > 2:  # the first wait of a producer is for nothing, the last arrival is heard by nobody
            middle = found[len(found) // 2]
            yield events[:middle] + events[middle + 1 :]


@pytest.mark.parametrize(
    ("direction", "shape", "places"),
    [
        ("forward", Shape(128, 512, 528), 20),
        ("backward", Shape(128, 320, 128), 20),
        ("backward", Shape(256, 320, 64), 18),  # one handing over of dq for both groups, not one each
    ],
)
def test_whatever_is_left_out_is_found(direction: str, shape: Shape, places: int) -> None:
    roles, counts = programs(traced(shape, direction, 90)[0])
    check(roles, counts)
    tried = 0
    for name, events in roles.items():
        for wrong in left_out(events):
            tried += 1
            with pytest.raises(Fault):
                check(roles | {name: wrong}, counts)
    assert tried >= places


def test_an_ampere_pipeline_without_a_barrier_is_found() -> None:
    roles, counts = programs(traced(AMPERE[0], "forward", 80)[0])
    ((name, events),) = roles.items()
    for what in ("named_sync", "copy_wait"):
        places = [i for i, e in enumerate(events) if e.what == what]
        with pytest.raises(Fault, match=r"before its own|nobody waits"):
            check({name: [e for i, e in enumerate(events) if i not in places[1:-1]]}, counts)


# --- turns -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A block adds to a tile of dq."""

    block: int
    tile: int
    turn: int
    m: int
    n: int
    batch: int
    head: int


@cache
def library() -> ctypes.CDLL:
    out = emulation.build() / "libturns.so"
    source = emulation.PROBES / "turns.cpp"
    command = ["g++", "-shared", *emulation.FLAGS, f"-I{emulation.ROOT / 'csrc'}", str(source), "-o", str(out)]
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=clean)
    found = ctypes.CDLL(str(out))
    found.turns.restype = ctypes.c_int64
    return found


class Call(NamedTuple):
    lengths: tuple[tuple[int, int], ...]
    """Queries and keys of each sequence; alike where they are not packed."""
    left: int = 1 << 30
    right: int = 1 << 30
    align_end: bool = False
    heads: int = 2
    kv_heads: int = 1
    span: int = 1
    is_packed: bool = False


def plan(call: Call, m: int, n: int) -> list[Step]:
    queries, keys = zip(*call.lengths, strict=True)
    most_q, most_k, tiles_q = max(queries), max(keys), -(-max(queries) // m)
    ends = [(ctypes.c_int * (len(x) + 1))(0, *torch.tensor(x).cumsum(0).tolist()) for x in (queries, keys)]
    if call.is_packed:
        tiles_q = sum(queries) // m + len(queries)
    tiles_k = -(-most_k // n)
    numbers = (len(queries), call.heads, call.kv_heads, most_q, most_k, tiles_k, tiles_q, call.span, call.left,
               call.right, call.left < 1 << 30, call.right < 1 << 30, call.align_end)  # fmt: skip
    room = (ctypes.c_int64 * (7 * len(queries) * call.heads * tiles_k * (-(-most_q // m) + 1)))()
    given = ends if call.is_packed else (None, None)
    count = library().turns(m, n, (ctypes.c_int * len(numbers))(*numbers), *given, room)
    assert 0 <= count <= len(room) // 7
    return [Step(*room[7 * i : 7 * i + 7]) for i in range(count)]


def sees(call: Call, batch: int, m: tuple[int, int], n: tuple[int, int]) -> bool:
    """Whether some query of a tile sees some key of another."""
    queries, keys = call.lengths[batch]
    distance = keys - queries if call.align_end else 0
    return any(
        max(n[0], i + distance - call.left) < min(n[1], keys, i + distance + call.right + 1)
        for i in range(m[0], min(m[1], queries))
    )


def in_order(steps: list[Step]) -> None:
    """Blocks that start in this order never wait for one that has not started: block after block, each to its end,
    nobody waits at all. So however few are there at a time and however they go on, the first of those that are there
    can; and what a tile's turns count is the blocks that add to it, in this order."""
    turns: dict[int, int] = defaultdict(int)
    for step in steps:
        assert step.turn == turns[step.tile], step
        turns[step.tile] += 1


CALLS = [
    Call(((q, k),), left, right, end, *heads)
    for q, k in ((1, 1), (130, 260), (260, 130), (300, 300), (64, 517), (517, 64), (0, 70), (70, 0))
    for left, right in ((1 << 30, 1 << 30), (1 << 30, 0), (100, 0), (30, 30), (0, 200), (200, 1 << 30), (1 << 30, 70))
    for end in (False, True)
    for heads in ((1, 1, 1), (4, 2, 2))
]
PACKED = [
    Call(lengths, left, right, end, is_packed=True)
    for lengths in (((100, 100), (1, 1), (300, 300)), ((64, 70), (0, 5), (130, 257), (65, 3)))
    for left, right in ((1 << 30, 1 << 30), (1 << 30, 0), (100, 0), (30, 30))
    for end in (False, True)
]
TILES = [(64, 128), (128, 128), (64, 64), (32, 64), (32, 32)]


@pytest.mark.parametrize(("m", "n"), TILES)
def test_no_block_waits_for_one_that_starts_later(m: int, n: int) -> None:
    most = 0
    for call in (*CALLS, *PACKED):
        steps = plan(call, m, n)
        in_order(steps)
        most = max(most, *(step.turn for step in steps), 0)
        done = {(s.batch, s.head, s.m // m, s.n // n) for s in steps}
        assert len(done) == len(steps)
        for batch, (queries, keys) in enumerate(call.lengths):
            for i in range(0, queries, m):
                for j in range(0, keys, n):
                    if (batch, 0, i // m, j // n) not in done:
                        assert not sees(call, batch, (i, i + m), (j, j + n))
    assert most > 0


@pytest.mark.parametrize("resident", [1, 2, 3, 100])
def test_few_blocks_at_a_time_in_any_order(resident: int) -> None:
    for n, call in enumerate([*CALLS[::5], *PACKED]):
        rng, turns = random.Random(n), defaultdict[int, int](int)
        waiting: dict[int, list[Step]] = defaultdict(list)
        for step in plan(call, 64, 64):
            waiting[step.block].append(step)
        numbers = iter(waiting)
        here = list(islice(numbers, resident))
        while here:
            able = [b for b in here if turns[waiting[b][0].tile] == waiting[b][0].turn]
            assert able, "every block waits for another"
            block = rng.choice(able)
            turns[waiting[block].pop(0).tile] += 1
            if not waiting[block]:
                here.remove(block)
                here.extend(islice(numbers, 1))


@pytest.mark.parametrize(("arch", "shape"), [(arch, shape) for arch in (80, 90) for shape in (
    Shape(64, 300, 300, 2, 1, CAUSAL), Shape(64, 260, 300, 1, 1, {"window": (60, 10)}),
    Shape(64, 300, 300, 1, 1, packed(130, 1, 169) | CAUSAL), Shape(256, 150, 150, 2, 1, CAUSAL),
)], ids=str)  # fmt: skip
def test_turns_of_the_kernels(arch: int, shape: Shape) -> None:
    """They take the turns that the plan gives them, in the order of the numbers that they drew."""
    drawn = []
    for block in traced(shape, "backward", arch):
        (number,) = (line[4] for line in block if line[2] == "count")
        awaited = [(line[3], line[4]) for line in block if line[2] == "await_turn"]
        assert awaited and [(a, b + 1) for a, b in awaited] == [(x[3], x[4]) for x in block if x[2] == "pass_turn"]
        drawn.append((number, awaited))
    turns: dict[int, int] = defaultdict(int)
    for _, awaited in sorted(drawn):
        for tile, turn in awaited:
            assert turn == turns[tile]
            turns[tile] += 1
    assert max(turns.values()) > 1
