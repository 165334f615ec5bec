"""tests/pipeline.py: right rings pass, every classical mistake in them is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipeline import WRITES, Event, Fault, Role, check, overlap

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


# --- what check() leaves out of its interleavings --------------------------------------------------------------------


class Plain:
    """The same machine without a thought: every step of every role by itself, every access with a beginning and an end,
    engines that end when they like. A fault is a conflict of two that go on at once, a read that has seen one thing in
    one order and another in another, a barrier that counts wrongly, or a standstill."""

    def __init__(self, roles: Roles, counts: dict[int, int]) -> None:
        self.roles = [Role(name, events) for name, events in roles.items()]
        self.counts = counts
        self.seen_by: dict[tuple[int, int], Any] = {}

    def moves(self, s: Any) -> Iterator[Any]:
        at, barriers, named, going, memory = s
        for r, i in going:
            event = self.roles[r].events[i]
            if event.what in WRITES:
                after = (at, barriers, named, going - {(r, i)}, {**dict(memory), **dict.fromkeys(event.ranges, (r, i))})
            else:
                after = (at, barriers, named, going - {(r, i)}, dict(memory))
            if event.what == "load":
                after = (at, self.counted(barriers, event.c, 0, -event.b), *after[2:])
            yield self.frozen(*after)
        for r, role in enumerate(self.roles):
            i = at[r]
            mine = [j for who, j in going if who == r]
            if i == len(role.events) or any(role.events[j].what in ("read", "write") for j in mine):
                continue
            event, on = role.events[i], tuple(a + (n == r) for n, a in enumerate(at))
            phase = dict(barriers).get(event.a, (0,))[0]
            threads, there = dict(named).get(event.a, (0, frozenset()))
            if event.ranges:
                self.begin(r, i, going, dict(memory))
                yield self.frozen(on, barriers, named, going | {(r, i)}, dict(memory))
            elif event.what == "wait":
                if (phase - event.b) % 2:
                    yield on, *s[1:]
            elif event.what in ("arrive", "expect"):
                more = event.b if event.what == "expect" else 0
                yield on, self.counted(barriers, event.a, event.threads, more), *s[2:]
            elif event.what == "named_arrive":
                if r in there:
                    raise Fault("twice")
                both = (threads + event.threads, there | {r}) if threads + event.threads < event.b else (0, frozenset())
                yield on, barriers, tuple(sorted({**dict(named), event.a: both}.items(), key=str)), going, memory
            elif event.what == "named_wait":
                if r not in there:
                    yield on, *s[1:]
            elif all(role.covered(j) != i + 1 for j in mine):  # but a wait for what goes on
                yield on, *s[1:]

    def begin(self, r: int, i: int, going: Any, memory: Any) -> None:
        event = self.roles[r].events[i]
        for who, j in going:
            other = self.roles[who].events[j]
            if overlap(event.ranges, other.ranges) and (event.what in WRITES or other.what in WRITES):
                raise Fault("at once")
        found = [memory.get(place) for place in event.ranges]
        if self.seen_by.setdefault((r, i), found) != found:
            raise Fault("seen in another order")

    def counted(self, barriers: Any, address: int, arrivals: int, more: int) -> Any:
        phase, pending, bytes_left = dict(barriers).get(address, (0, self.counts[address], 0))
        pending, bytes_left = pending - arrivals, bytes_left + more
        if pending < 0:
            raise Fault("more arrivals")
        now = (phase, pending, bytes_left) if pending or bytes_left else (phase + 1, self.counts[address], 0)
        return tuple(sorted({**dict(barriers), address: now}.items()))

    @staticmethod
    def frozen(at: Any, barriers: Any, named: Any, going: Any, memory: Any) -> Any:
        return at, barriers, named, going, tuple(sorted(memory.items()))

    def explore(self) -> int:
        first: Any = ((0,) * len(self.roles), (), (), frozenset(), ())
        seen, rest = {first}, [first]
        while rest:
            state = rest.pop()
            following = list(self.moves(state))
            if not following and any(a < len(r.events) for a, r in zip(state[0], self.roles, strict=True)):
                raise Fault("standstill")
            rest += {s for s in following if s not in seen}
            seen.update(following)
        return len(seen)


RIGHT: dict[str, tuple[Roles, dict[int, int]]] = {
    "ring": ring(2, 3), "ring of 3": ring(3, 4), "two consumers": ring(2, 2, consumers=2), "one tile": ring(2, 1),
    "turns": (ping_pong(3), {}), "staged": staged(3, fence=False),
}  # fmt: skip


def wrong(roles: Roles) -> Iterator[Roles]:
    """With one step left out, done twice, or done after the next."""
    for who, events in roles.items():
        for i in range(len(events)):
            yield roles | {who: events[:i] + events[i + 1 :]}
            yield roles | {who: events[: i + 1] + events[i:]}
            yield roles | {who: events[:i] + events[i : i + 2][::-1] + events[i + 2 :]}


def fenced(roles: Roles) -> Roles:
    fence = Event("fence_async", threads=128)
    return {who: [s for e in events for s in ((e, fence) if e.what == "write" else (e,))]
            for who, events in roles.items()}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_no_order_that_is_left_out_matters(name: str) -> None:
    """The machine that leaves none out judges alike, of the right programs and of hundreds that are nearly right. It
    knows no fences, so there is one behind each write, and does not mind what goes on at the end."""
    roles, counts = RIGHT[name]
    assert check(fenced(roles), counts) < Plain(roles, counts).explore()
    judged = {True: 0, False: 0}
    for changed in wrong(roles):
        fault = ""
        try:
            check(fenced(changed), counts)
        except Fault as found:
            fault = str(found)
        if "nobody waits" in fault:
            continue
        try:
            Plain(changed, counts).explore()
            right = True
        except Fault:
            right = False
        assert right == (not fault), fault
        judged[right] += 1
    assert min(judged.values()) > 2
