"""tests/pipeline.py: right rings pass, every classical mistake in them is found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pipeline import Event, Fault, check

TILE = 1024
STAGING = 1 << 16
"""Where results wait for the copy engine."""
FULL, EMPTY = 1 << 20, 1 << 21
"""Addresses of barriers, of stage 0."""
Roles = dict[str, list[Event]]


def at(what: str, place: int, n: int = 0, barrier: int = 0, threads: int = 1) -> Event:
    return Event(what, b=TILE, c=barrier, threads=threads, ranges=(((place + n) * TILE, (place + n + 1) * TILE),))


def ring(
    stages: int, tiles: int, *, consumers: int = 1, first_parity: int = 1, expected: int = TILE,
    release_early: bool = False, waits: bool = True, flips: bool = True, releases: bool = True,
) -> tuple[Roles, dict[int, int]]:  # fmt: skip
    """A producer that loads and consumers that multiply, two products under way."""
    producer, consumer = [], []
    for n in range(tiles):
        stage, turn = n % stages, n // stages
        full, empty = FULL + 8 * stage, EMPTY + 8 * stage
        producer += [
            Event("wait", empty, (turn + first_parity) % 2), Event("expect", full, expected),
            at("load", stage, barrier=full),
        ]  # fmt: skip
        if waits:
            consumer.append(Event("wait", full, turn % 2 if flips else 0))
        consumer += [at("multiply", stage), Event("warpgroup_commit")]
        behind = n if release_early else n - 1
        if n > 0:
            consumer.append(Event("warpgroup_wait", 1))
        if behind >= 0 and releases:
            consumer.append(Event("arrive", EMPTY + 8 * (behind % stages)))
    consumer.append(Event("warpgroup_wait", 0))
    counts = {FULL + 8 * s: 1 for s in range(stages)} | {EMPTY + 8 * s: consumers for s in range(stages)}
    return {"producer": producer} | {f"consumer {c}": consumer for c in range(consumers)}, counts


@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
def test_a_right_ring(stages: int, tiles: int, consumers: int) -> None:
    assert check(*ring(stages, tiles, consumers=consumers)) > 2 * tiles


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"first_parity": 0}, "deadlock"),  # as if the buffers were full at the start
        ({"releases": False}, "deadlock"),
        ({"expected": 2 * TILE}, "deadlock"),
        ({"release_early": True}, "begins while consumer"),
        ({"waits": False}, "before load|begins while|more arrivals"),
        ({"flips": False}, "before load|more arrivals|are over"),
    ],
)
def test_mistakes_of_a_ring(stages: int, mistake: dict[str, Any], found: str) -> None:
    with pytest.raises(Fault, match=found):
        check(*ring(stages, 5, **mistake))


def test_one_stage_cannot_keep_two_products_under_way() -> None:
    with pytest.raises(Fault, match="deadlock"):
        check(*ring(1, 3))


def test_a_barrier_that_counts_too_few() -> None:
    roles, counts = ring(2, 4, consumers=2)
    with pytest.raises(Fault, match=r"more arrivals|begins while"):
        check(roles, counts | {EMPTY: 1, EMPTY + 8: 1})


def test_a_phase_that_comes_and_goes_twice_unseen() -> None:
    """An onlooker waits for each phase, and nobody waits for the onlooker."""
    roles, counts = ring(2, 5)
    roles["onlooker"] = [Event("wait", FULL, turn % 2) for turn in range(3)]
    with pytest.raises(Fault, match=r"onlooker.*are over"):
        check(roles, counts)


# --- numbered barriers -----------------------------------------------------------------------------------------------


def ping_pong(tiles: int, *, first: bool = True, passes: bool = True, threads: int = 256) -> Roles:
    """Two groups that take turns."""
    groups: list[list[Event]] = [[], []]
    if first:
        groups[1].append(Event("named_arrive", 2, 256, threads=128))
    for me, events in enumerate(groups):
        for _ in range(tiles):
            events.append(Event("named_sync", 2 + me, 256, threads=128))
            if passes:
                events.append(Event("named_arrive", 2 + (me ^ 1), threads, threads=128))
    return {f"group {n}": events for n, events in enumerate(groups)}


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_taking_turns(tiles: int) -> None:
    assert check(ping_pong(tiles), {}) > tiles


@pytest.mark.parametrize(
    ("mistake", "found"),
    [({"first": False}, "deadlock"), ({"passes": False}, "deadlock"), ({"threads": 384}, "others count|deadlock")],
)
def test_mistakes_in_taking_turns(mistake: dict[str, Any], found: str) -> None:
    with pytest.raises(Fault, match=found):
        check(ping_pong(3, **mistake), {})


def test_two_generations_are_not_mixed() -> None:
    """One announces twice before the other has come once."""
    roles = {
        "writer": [Event("named_arrive", 1, 256, threads=128)] * 2,
        "reader": [Event("named_sync", 1, 256, threads=128)] * 2,
    }
    with pytest.raises(Fault, match="twice in one generation"):
        check(roles, {})


# --- what threads write, and what the copy engine stores ------------------------------------------------------------


def staged(
    tiles: int, *, fence: bool = True, fences: int = 128, meets: bool = True, wait_read: bool = True,
    frees: bool = True, last_wait: bool = True,
) -> tuple[Roles, dict[int, int]]:  # fmt: skip
    """A group writes results to shared memory that another warp adds to global memory: dq of the backward."""
    writer, storer = [], []
    for _ in range(tiles):
        if frees:
            writer.append(Event("named_sync", 2, 160, threads=128))
            storer.append(Event("named_arrive", 2, 160, threads=32))
        writer.append(at("write", STAGING, threads=128))
        if fence:
            writer.append(Event("fence_async", threads=fences))
        if meets:
            writer.append(Event("named_arrive", 1, 160, threads=128))
            storer.append(Event("named_sync", 1, 160, threads=32))
        storer += [at("store", STAGING), Event("bulk_commit")]
        if wait_read:
            storer.append(Event("bulk_wait_read", 0))
    if last_wait:
        storer.append(Event("bulk_wait", 0))
    return {"writer": writer, "storer": storer}, {}


def test_results_that_another_warp_stores() -> None:
    assert check(*staged(4)) > 8


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"wait_read": False}, "tells nobody|begins while storer"),  # the buffer is used again while it is read
        ({"fence": False}, "tells nobody"),
        ({"fences": 1}, "tells nobody"),  # the storing thread alone fenced
        ({"meets": False}, "tells nobody|begins while"),
        ({"frees": False}, "begins while|twice in one generation"),
        ({"wait_read": False, "last_wait": False}, "nobody waits"),
    ],
)
def test_mistakes_in_storing(mistake: dict[str, Any], found: str) -> None:
    with pytest.raises(Fault, match=found):
        check(*staged(3, **mistake))


# --- within a group --------------------------------------------------------------------------------------------------


def several_warps(meet: bool) -> tuple[Roles, dict[int, int]]:
    """Four warps read a buffer by ordinary loads, one thread gives it back."""
    every = frozenset(range(4))
    consumer, producer = [], []
    for turn in range(3):
        producer += [
            Event("wait", EMPTY, (turn + 1) % 2), Event("expect", FULL, TILE), at("load", 0, barrier=FULL),
        ]  # fmt: skip
        consumer.append(Event("wait", FULL, turn % 2, threads=128, warps=every))
        consumer += [at("read", 0, threads=32)._replace(warps=frozenset({w})) for w in range(4)]
        if meet:
            consumer.append(Event("named_sync", 1, 128, threads=128, warps=every))
        consumer.append(Event("arrive", EMPTY))
    return {"producer": producer, "consumer": consumer}, {FULL: 1, EMPTY: 1}


def test_one_thread_speaks_for_its_group_behind_a_barrier_only() -> None:
    assert check(*several_warps(meet=True)) > 6
    with pytest.raises(Fault, match="phase 0 and the next are over"):
        check(*several_warps(meet=False))


@pytest.mark.parametrize("between", [[], [Event("warpgroup_wait", 1)]])
def test_a_group_awaits_its_own_product(between: list[Event]) -> None:
    events = [at("multiply", 0), Event("warpgroup_commit"), *between, at("write", 0), Event("warpgroup_wait", 0)]
    with pytest.raises(Fault, match="its own multiply"):
        check({"group": events}, {})
    del events[2:-2]
    events[2:4] = reversed(events[2:4])
    assert check({"group": events}, {}) == 1


def test_what_threads_wrote_is_fenced_for_their_own_product() -> None:
    write, fence, multiply = at("write", 0), Event("fence_async"), at("multiply", 0)
    rest = [Event("warpgroup_commit"), Event("warpgroup_wait", 0)]
    assert check({"group": [write, fence, multiply, *rest]}, {}) == 1
    for wrong in ([write, multiply], [fence, write, multiply]):
        with pytest.raises(Fault, match="its own write"):
            check({"group": [*wrong, *rest]}, {})


def test_a_wait_is_for_those_who_take_part() -> None:
    both = frozenset({0, 1})
    events = [
        Event("wait", FULL, 0, threads=32), Event("named_sync", 1, 64, threads=64, warps=both),
        at("read", 0, threads=64)._replace(warps=both),
    ]  # fmt: skip
    loads = [Event("expect", FULL, TILE), at("load", 0, barrier=FULL)]
    assert check({"loads": loads, "reads": events}, {FULL: 1}) > 2
    with pytest.raises(Fault, match="by warps that have not waited"):
        check({"loads": loads, "reads": [events[0], events[2]]}, {FULL: 1})


def test_turns_are_passed_on_when_all_is_written() -> None:
    turn = [Event("await_turn", 1, 4), at("store", 0), Event("bulk_commit"), Event("bulk_wait", 0),
            Event("pass_turn", 1, 5)]  # fmt: skip
    assert check({"adds": turn}, {}) == 1
    early = [*turn[:3], Event("bulk_wait_read", 0), turn[4], turn[3]]
    for wrong, found in (
        (early, "before what it stores is written"),
        (turn[1:], "passes on a turn that it has not"),
        ([*turn[:4], Event("pass_turn", 1, 6)], "passes on a turn that it has not"),
        ([*turn[1:4], *turn], "out of turn"),
    ):
        with pytest.raises(Fault, match=found):
            check({"adds": wrong}, {})
