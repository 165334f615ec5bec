"""Barriers and pipelines of a block, over every interleaving.

What a kernel does at barriers does not depend on who comes first, so one run tells the program of each role, a warp
group or a warp that acts alone: what it waits for, tells others, reads and writes in shared memory, in its order.
check() goes through all states that any order of the roles and of the copy engine's completions leads to. It finds

    - a deadlock, and threads that wait for a phase which may have come and gone twice (parity tells two apart),
    - more arrivals than a barrier counts; two generations of a numbered barrier mixed,
    - bytes read before they are written, or written while somebody may still read or write them,
    - writes of threads that products or the copy engine read without fence_async() of every thread that wrote,
    - copies and stores that nobody waits for, turns passed on before what was to be added is there.

What begins begins as soon as it may, what goes on ends as late as it may: a read or a write of threads is over for
others when its warp next tells somebody, a product or a bulk store when moreover its own wait covered it, a load when
its barrier's phase has ended. So of the steps only those that tell others are worth an interleaving each, and a
conflict is a property of a state: somebody begins where another has not ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Range = tuple[int, int]
"""First byte and the one behind the last."""


class Fault(Exception):
    """What is wrong, and the steps that lead there."""


class Event(NamedTuple):
    """One step of a role; whats and their numbers are those of csrc/cuda/emulation/emulator.h."""

    what: str
    a: int = 0
    b: int = 0
    c: int = 0
    threads: int = 1
    """That take it: all of them arrive."""
    warps: frozenset[int] = frozenset({0})
    """Those of the role that take it; products are of all together."""
    ranges: tuple[Range, ...] = ()
    """Of shared memory that are read or written."""

    def __str__(self) -> str:
        where = " ".join(f"[{low}, {high})" for low, high in self.ranges[:3])
        return f"{self.what} {where or (self.a, self.b)}"


TELLS = frozenset({"arrive", "expect", "named_arrive"})
"""Steps by which others may learn how far a warp has come."""
READS, WRITES = frozenset({"read", "multiply", "store"}), frozenset({"write", "copy", "load"})
ENGINES = frozenset({"multiply", "store", "load"})
"""Accesses that see what threads wrote only behind a fence_async()."""
GROUPS = {
    "multiply": ("warpgroup_commit", ("warpgroup_wait",)),
    "store": ("bulk_commit", ("bulk_wait_read", "bulk_wait")),
    "copy": ("copy_commit", ("copy_wait",)),
}
"""What ends a group of these, and what waits for all groups but so many."""


@dataclass
class Role:
    name: str
    events: list[Event]
    """named_sync stands here as named_arrive and named_wait."""

    def __post_init__(self) -> None:
        halves = {"named_sync": ("named_arrive", "named_wait")}
        self.events = [e._replace(what=what) for e in self.events for what in halves.get(e.what, (e.what,))]

    def shares(self, i: int, warps: frozenset[int]) -> bool:
        return bool(self.events[i].warps & warps)

    def covered(self, i: int, only: str = "") -> int | None:
        """Index behind which access i is over for who did it, by its waits or one of them alone; None: never. Loads:
        by their barrier, not here."""
        event = self.events[i]
        if event.what not in GROUPS:
            return i + 1
        commit, waits = GROUPS[event.what]
        waits = (only,) if only else waits
        later = -1  # groups since, the access's own not counted
        for j in range(i + 1, len(self.events)):
            other = self.events[j]
            if not other.warps & event.warps:
                continue
            later += other.what == commit
            if other.what in waits and later >= other.a:
                return j + 1
        return None

    def fenced(self, i: int) -> int | None:
        """Index behind which what access i wrote is there for products and the copy engine."""
        event = self.events[i]
        for j in range(self.covered(i) or len(self.events), len(self.events)):
            other = self.events[j]
            if other.what == "fence_async" and event.warps <= other.warps and other.threads >= event.threads:
                return j + 1
        return None

    def ended(self, i: int, reader: str) -> int | None:
        """Index behind which access i does not disturb a `reader` any more."""
        if self.events[i].what in ("write", "copy") and reader in ("multiply", "store"):
            return self.fenced(i)
        return self.covered(i)

    def told(self, i: int, reader: str) -> int | None:
        """Steps after which every other role that was told anything knows access i to have ended."""
        start = self.ended(i, reader)
        if start is None:
            return None
        warps = self.events[i].warps
        for j in range(start, len(self.events)):
            if self.events[j].what in TELLS and (self.events[i].what == "multiply" or self.shares(j, warps)):
                return j + 1
        return None

    def known(self, warp: int, at: int) -> int:
        """Steps that a warp has certainly taken when the role has taken `at`: those before it last told anything, and
        those before a product that has ended, which no warp makes alone."""
        for i in range(at - 1, -1, -1):
            event = self.events[i]
            if event.what in TELLS and warp in event.warps:
                return i + 1
            if event.what == "multiply" and (self.told(i, "load") or at + 1) <= at:
                return i + 1
        return 0

    def check_wait(self, i: int) -> None:
        """Warps that do not take part in a wait meet those that do before they touch anything."""
        others = frozenset().union(*(e.warps for e in self.events)) - self.events[i].warps
        for event in self.events[i + 1 :]:
            if event.what == "named_wait" and event.warps & self.events[i].warps:
                others -= event.warps
            if event.ranges and event.warps & others:
                raise Fault(f"{self.name}: {event} by warps that have not waited: {self.events[i]}")

    def check_turns(self) -> None:
        """What adds to global memory stands between the wait for a turn and its passing on, and is written by then."""
        any_turn = any(e.what == "await_turn" for e in self.events)
        turn: Event | None = None
        stores: list[int] = []
        for i, event in enumerate(self.events):
            if event.what == "await_turn":
                turn, stores = event, []
            elif event.what == "store" and any_turn:
                stores.append(i)
                if turn is None:
                    raise Fault(f"{self.name}: {event} out of turn")
            elif event.what == "pass_turn":
                if turn is None or (turn.a, turn.b + 1) != (event.a, event.b):
                    raise Fault(f"{self.name}: {event} passes on a turn that it has not: {turn}")
                if any((self.covered(j, "bulk_wait") or i + 1) > i for j in stores):
                    raise Fault(f"{self.name}: {event} before what it stores is written")
                turn = None

    def ordered(self, i: int, j: int) -> bool:
        """Whether access i of this role has ended when its access j begins."""
        start, first, second = self.ended(i, self.events[j].what), self.events[i], self.events[j]
        if start is None or start > j:
            return False
        between = self.events[start:j]
        if "multiply" in (first.what, second.what):
            return True
        if first.warps & second.warps and first.threads == second.threads:
            return True
        meet = {"named_wait", "syncwarp"} if first.warps & second.warps else {"named_wait"}
        return any(e.what in meet and e.warps & first.warps and e.warps & second.warps for e in between)


class Barrier(NamedTuple):
    phase: int = 0
    pending: int = 0
    bytes: int = 0
    """Announced, not landed."""
    under_way: tuple[tuple[int, int], ...] = ()
    """Loads, as role and index."""


class Named(NamedTuple):
    threads: int = 0
    roles: frozenset[int] = frozenset()
    """Who has arrived in this generation."""
    expected: int = 0


class State(NamedTuple):
    at: tuple[int, ...]
    """Steps that each role has taken."""
    barriers: tuple[Barrier, ...]
    named: tuple[Named, ...]


@dataclass
class Model:
    roles: list[Role]
    counts: Mapping[int, int]
    """Arrivals of each mbarrier's phase, by address."""
    needs: dict[tuple[int, int], tuple[dict[int, int], list[tuple[int, int]]]] = field(default_factory=dict)
    """For each access, steps that other roles must have taken, and loads that must have landed, before it begins."""

    def __post_init__(self) -> None:
        self.slot = {address: n for n, address in enumerate(self.counts)}
        self.arrivals = list(self.counts.values())
        numbers = sorted({e.a for r in self.roles for e in r.events if e.what in ("named_arrive", "named_wait")})
        self.number = {number: n for n, number in enumerate(numbers)}
        self.phases = [self._phases(r) for r in self.roles]
        self.begun: list[tuple[int, int]] | None = []
        """Accesses in the order of the first run, while that goes on."""
        self.standing: dict[tuple[int, int, int], int | None] = {}

    def _phases(self, role: Role) -> dict[int, int]:
        """Which phase each wait is for: the first of its parity from the last on that this role waited for."""
        last: dict[int, int] = {}
        found = {}
        for i, event in enumerate(role.events):
            if event.what == "wait":
                phase = last.get(event.a, -1)
                found[i] = last[event.a] = phase + (phase - event.b) % 2
        return found

    # --- one step ----------------------------------------------------------------------------------------------------

    def start(self) -> State:
        barriers = tuple(Barrier(pending=count) for count in self.arrivals)
        return self._settle([0] * len(self.roles), list(barriers), [Named()] * len(self.number))

    def moves(self, s: State) -> list[tuple[str, int]]:
        found = [
            ("step", r)
            for r, at in enumerate(s.at)
            if at < len(self.roles[r].events) and self.roles[r].events[at].what in TELLS
        ]
        for n, b in enumerate(s.barriers):  # loads that land without ending a phase are seen by nobody
            landing = sum(self.roles[r].events[i].b for r, i in b.under_way)
            if b.under_way and b.pending == 0 and b.bytes == landing:
                found.append(("land", n))
        return found

    def move(self, s: State, kind: str, n: int) -> State:
        at, barriers, named = list(s.at), list(s.barriers), list(s.named)
        if kind == "land":
            barriers[n] = barriers[n]._replace(under_way=(), bytes=0)
            self._turn(n, at, barriers)
        else:
            event = self.roles[n].events[at[n]]
            at[n] += 1
            if event.what == "named_arrive":
                self._arrive_named(n, event, named)
            else:
                slot = self.slot[event.a]
                b = barriers[slot]
                if b.pending < event.threads:
                    raise Fault(f"{self.roles[n].name}: {event}: more arrivals than the phase counts")
                more = event.b if event.what == "expect" else 0
                barriers[slot] = b._replace(pending=b.pending - event.threads, bytes=b.bytes + more)
                self._turn(slot, at, barriers)
        return self._settle(at, barriers, named)

    def _turn(self, slot: int, at: list[int], barriers: list[Barrier]) -> None:
        """Ends the phase where nothing is missing, unless somebody may still have to see the one before."""
        b = barriers[slot]
        if b.pending or b.bytes or b.under_way:
            return
        barriers[slot] = Barrier(b.phase + 1, self.arrivals[slot])
        for r, role in enumerate(self.roles):
            key = r, at[r], slot
            if key not in self.standing:
                self.standing[key] = self._first_wait(*key)
            i = self.standing[key]
            if i is not None and self.phases[r][i] < b.phase:
                raise Fault(f"{role.name}: {role.events[i]}: its phase {self.phases[r][i]} and the next are over")

    def _first_wait(self, r: int, at: int, slot: int) -> int | None:
        """The first wait for this barrier that some warp may still stand at: it told nobody anything since."""
        role, found = self.roles[r], []
        for warp in {w for e in role.events for w in e.warps}:
            for i in range(role.known(warp, at), len(role.events)):
                event = role.events[i]
                if event.what == "wait" and warp in event.warps and self.slot[event.a] == slot:
                    found.append(i)
                    break
        return min(found, default=None)

    def _arrive_named(self, r: int, event: Event, named: list[Named]) -> None:
        n = self.number[event.a]
        b = named[n]
        if r in b.roles:
            raise Fault(f"{self.roles[r].name}: {event}: arrives twice in one generation")
        if b.roles and b.expected != event.b:
            raise Fault(f"{self.roles[r].name}: {event}: others count {b.expected} threads")
        threads = b.threads + event.threads
        if threads > event.b:
            raise Fault(f"{self.roles[r].name}: {event}: {threads} threads arrive")
        named[n] = Named() if threads == event.b else Named(threads, b.roles | {r}, event.b)

    def _settle(self, at: list[int], barriers: list[Barrier], named: list[Named]) -> State:
        """Every role goes on until it tells others something, or waits."""
        for r, role in enumerate(self.roles):
            while at[r] < len(role.events):
                event = role.events[at[r]]
                if event.what in TELLS:
                    break
                if event.what == "wait" and (barriers[self.slot[event.a]].phase - event.b) % 2 == 0:
                    break
                if event.what == "named_wait" and r in named[self.number[event.a]].roles:
                    break
                if event.ranges:
                    self._begin(r, at, barriers)
                if event.what == "load":
                    slot = self.slot[event.c]
                    barriers[slot] = barriers[slot]._replace(under_way=(*barriers[slot].under_way, (r, at[r])))
                at[r] += 1
        return State(tuple(at), tuple(barriers), tuple(named))

    def _begin(self, r: int, at: list[int], barriers: list[Barrier]) -> None:
        i = at[r]
        if self.begun is not None:
            self.begun.append((r, i))
        steps, loads = self.needs.get((r, i), ({}, []))
        for other, least in steps.items():
            if at[other] < least:
                role = self.roles[other]
                raise Fault(
                    f"{self.roles[r].name}: {self.roles[r].events[i]} begins while {role.name}, at {at[other]} of "
                    f"{len(role.events)}, has not told that it is through with what it has there"
                )
        for other, load in loads:
            event = self.roles[other].events[load]
            if at[other] <= load or (other, load) in barriers[self.slot[event.c]].under_way:
                raise Fault(f"{self.roles[r].name}: {self.roles[r].events[i]} begins before {event} has landed")

    # --- all of it ---------------------------------------------------------------------------------------------------

    def first_run(self) -> None:
        """One run to its end, for the order of conflicting accesses: in a right program it is that of every run."""
        state = self.start()
        while moves := self.moves(state):
            state = self.move(state, *moves[0])
        self._check_end(state)
        begun, self.begun = self.begun or [], None
        self._order(begun)

    def _order(self, begun: Sequence[tuple[int, int]]) -> None:
        """What each access has to wait for; conflicts within a role are judged here, they are in program order."""
        for n, (r, i) in enumerate(begun):
            mine = self.roles[r].events[i]
            steps: dict[int, int] = {}
            loads: list[tuple[int, int]] = []
            for other, j in begun[:n]:
                role = self.roles[other]
                theirs = role.events[j]
                if (mine.what in READS and theirs.what in READS) or not overlap(mine.ranges, theirs.ranges):
                    continue
                if theirs.what == "load":
                    loads.append((other, j))
                elif other == r:
                    if not role.ordered(j, i):
                        raise Fault(f"{role.name}: {mine} begins before its own {theirs} has ended")
                else:
                    least = role.told(j, mine.what)
                    if least is None:
                        raise Fault(f"{role.name} tells nobody the end of {theirs}, which {mine} must await")
                    steps[other] = max(steps.get(other, 0), least)
            self.needs[r, i] = steps, loads

    def _check_end(self, s: State) -> None:
        standing = [
            f"{role.name} at {at}: {role.events[at]}"
            for role, at in zip(self.roles, s.at, strict=True)
            if at < len(role.events)
        ]
        if standing:
            raise Fault("deadlock: " + "; ".join(standing))
        if any(b.under_way for b in s.barriers):
            raise Fault("the block ends while a load is under way")

    def explore(self, most: int) -> int:
        """All states; how many there are."""
        first = self.start()
        seen: dict[State, tuple[State, tuple[str, int]] | None] = {first: None}
        queue = deque([first])
        while queue:
            state = queue.popleft()
            moves = self.moves(state)
            try:
                if not moves:
                    self._check_end(state)
                for step in moves:
                    following = self.move(state, *step)
                    if following not in seen:
                        seen[following] = (state, step)
                        queue.append(following)
            except Fault as fault:
                raise Fault(f"{fault}\nafter {self._path(seen, state)}") from None
            if len(seen) > most:
                raise RuntimeError(f"more than {most} states")
        return len(seen)

    def _path(self, seen: Mapping[State, tuple[State, tuple[str, int]] | None], state: State) -> str:
        steps = []
        while (before := seen[state]) is not None:
            state, (kind, n) = before
            steps.append(
                f"{self.roles[n].name}: {self.roles[n].events[state.at[n]]}" if kind == "step" else f"barrier {n} lands"
            )
        return "; ".join(reversed(steps[:12])) or "nothing"


def overlap(one: Sequence[Range], other: Sequence[Range]) -> bool:
    """Both in ascending order."""
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i][0] < other[j][1] and other[j][0] < one[i][1]:
            return True
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return False


# --- what a kernel did -----------------------------------------------------------------------------------------------

ALONE = frozenset({"read", "write", "copy", "load", "store", "fence_async", "copy_commit", "copy_wait", "bulk_commit",
                   "bulk_wait_read", "bulk_wait", "syncwarp"})  # fmt: skip
"""What a warp does by itself. The rest the warps of a role do together, as far as they do it."""
SILENT = frozenset({"init", "init_done", "registers", "warpgroup_fence", "count"})
RUNS = frozenset({"read", "write", "copy", "multiply"})
"""One after the other they are one, with all that they read or write; like these, others have a range for a and b."""
Traced = tuple[int, int, str, int, int, int]
"""block, thread, what, a, b, c: csrc/cuda/emulation/emulator.h."""


def blocks(traces: Iterable[Traced]) -> Iterator[list[Traced]]:
    """Of each block of each launch, what its threads did, behind the line of the launch."""
    found: dict[int, list[Traced]] = {}
    launch = None
    for line in traces:
        if line[2] == "launch":
            yield from found.values()
            launch, found = line, {}
        else:
            assert launch is not None
            found.setdefault(line[0], [launch]).append(line)
    yield from found.values()


def programs(block: Sequence[Traced]) -> tuple[dict[str, list[Event]], dict[int, int]]:
    """Its roles, and the arrivals that its barriers count."""
    noted: dict[int, list[tuple[str, int, int, int, set[Range]]]] = {thread: [] for thread in range(block[0][4])}
    counts = {a: b for _, _, what, a, b, _ in block if what == "init"}
    for _, thread, what, a, b, c in block[1:]:
        mine = noted[thread]
        if what in RUNS and mine and mine[-1][0] == what:
            mine[-1][4].add((a, a + b))
        elif what in RUNS or what in ("store", "load"):
            mine.append((what, 0, 0 if what in RUNS else b, c, {(a, a + b)}))
        elif what not in SILENT:
            mine.append((what, a, b, c, set()))
    threads = {
        thread: [Event(*event[:4], warps=frozenset({thread // 32}), ranges=tuple(event[4])) for event in events]
        for thread, events in noted.items()
    }
    multiplying = {t // 128 for t, events in threads.items() if any(e.what == "multiply" for e in events)}
    members: dict[str, list[int]] = {}
    for t in threads:
        name = "block" if not multiplying else f"group {t // 128}" if t // 128 in multiplying else f"warp {t // 32}"
        members.setdefault(name, []).append(t)
    roles: dict[str, list[Event]] = {}
    idle: dict[tuple[Event, ...], str] = {}
    for name, group in members.items():
        events = merged({t: threads[t] for t in group})
        steps = tuple(e._replace(warps=frozenset({0})) for e in events)
        if steps in idle and all(e.what.startswith("named") for e in events):  # warps that only come to the barriers
            same = idle[steps]
            roles[same] = [
                e._replace(threads=e.threads + f.threads, warps=e.warps | f.warps)
                for e, f in zip(roles[same], events, strict=True)
            ]
        else:
            roles[name] = events
            idle[steps] = name
    return roles, counts


def merged(threads: Mapping[int, Sequence[Event]]) -> list[Event]:
    """The steps of threads that act alike as one list: each thread's in its order, those of fewer threads first, so
    that what one does alone stands in front of where it meets the others again."""
    left = {t: deque(events) for t, events in threads.items()}
    found: list[Event] = []

    def take(chosen: Sequence[int]) -> None:
        taken = [left[t].popleft() for t in chosen]
        ranges = sorted({r for e in taken for r in e.ranges})
        warps = frozenset().union(*(e.warps for e in taken))
        b = sum(e.b for e in taken) if taken[0].what == "load" else taken[0].b
        found.append(taken[0]._replace(b=b, threads=len(taken), warps=warps, ranges=joined(ranges)))

    def key(event: Event) -> tuple[object, ...]:
        return event.what, event.a, event.b, event.c, *(event.warps if event.what in ALONE else ())

    while True:
        heads: dict[tuple[object, ...], list[int]] = {}
        for t, events in left.items():
            if events:
                heads.setdefault(key(events[0]), []).append(t)
        if not heads:
            return found
        ready = {k: chosen for k, chosen in heads.items() if k[0] != "syncwarp" or len(chosen) == 32}
        alone = [chosen for k, chosen in ready.items() if k[0] in ALONE]
        take(alone[0] if alone else min(ready.values(), key=len))


def joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for low, high in ranges:
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return tuple(found)


# --- the check -------------------------------------------------------------------------------------------------------


def check(roles: Mapping[str, list[Event]], counts: Mapping[int, int], most: int = 1_000_000) -> int:
    """Raises Fault, or gives the number of states. counts: arrivals of each mbarrier's phase, by its address."""
    model = Model([Role(name, list(events)) for name, events in roles.items()], counts)
    for role in model.roles:
        role.check_turns()
        for i, event in enumerate(role.events):
            if event.what in GROUPS and role.covered(i) is None:
                raise Fault(f"{role.name}: {event}: nobody waits for its end")
            if event.what == "wait":
                role.check_wait(i)
    model.first_run()
    return model.explore(most)
