"""launch() starts the binary that Triton's own `kernel[grid](...)` would, with the same arguments. Without a GPU.

Compiler and driver are stand-ins: what they are asked for is compared, nothing is compiled and nothing runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastlm.kernels import _platform

triton = pytest.importorskip("triton")
if _platform.INTERPRETED:
    pytest.skip("the interpreter starts kernels its own way", allow_module_level=True)

from triton import knobs  # noqa: E402

from bench.ahead_of_time import _gate  # noqa: E402
from bench.launch import Machine  # noqa: E402
from fastlm.kernels import _launch  # noqa: E402
from fastlm.kernels._launch import launch  # noqa: E402

tl = triton.language
GRID = (7, 3)


@triton.jit
def _kernel(x, y, extra, size, stride, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr = 64):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) * scale)


@triton.jit
def _other(x, y, extra, size, stride, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr = 64):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + scale)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    for kernel in (_kernel, _other):
        kernel.device_caches.clear()
    with made.installed():
        yield made


def same(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Grid, stream, binary and its metadata, and after the three places of hooks the kernel's arguments."""
    assert mine[:6] == theirs[:6]
    assert len(mine) == len(theirs)
    for a, b in zip(mine[9:], theirs[9:], strict=True):
        assert a is b or (type(a) is type(b) and a == b)


BASE = {
    "x": lambda: torch.empty(64), "y": lambda: torch.empty(64), "extra": lambda: None, "size": lambda: 48,
    "stride": lambda: 5, "scale": lambda: 0.5,
}  # fmt: skip
CHANGES: dict[str, dict[str, Callable[[], Any]]] = {
    "another dtype of x": {"x": lambda: torch.empty(64, dtype=torch.bfloat16)},
    "another dtype of y": {"y": lambda: torch.empty(64, dtype=torch.float16)},
    "x unaligned": {"x": lambda: torch.empty(68)[1:65]},
    "y unaligned": {"y": lambda: torch.empty(68)[2:66]},
    "a tensor for None": {"extra": lambda: torch.empty(1)},
    "an unaligned tensor for None": {"extra": lambda: torch.empty(2)[1:]},
    "size 1": {"size": lambda: 1},
    "size not divisible": {"size": lambda: 49},
    "size of 64 bits": {"size": lambda: 1 << 31},
    "size of 64 bits, not divisible": {"size": lambda: (1 << 31) + 1},
    "size negative, 64 bits": {"size": lambda: -(1 << 31) - 16},
    "stride divisible": {"stride": lambda: 32},
    "stride 1": {"stride": lambda: 1},
}
SAME_BINARY: dict[str, dict[str, Callable[[], Any]]] = {
    "other tensors": {"x": lambda: torch.empty(128), "y": lambda: torch.empty(256)},
    "aligned with an offset": {"x": lambda: torch.empty(72)[4:68]},
    "another size of its kind": {"size": lambda: 1024},
    "0": {"size": lambda: 0},
    "negative": {"size": lambda: -16},
    "the largest of 32 bits": {"stride": lambda: (1 << 31) - 1},
    "another float": {"scale": lambda: 1.0},
}


def arguments(change: dict[str, Callable[[], Any]]) -> list[Any]:
    return [make() for make in (BASE | change).values()]


@pytest.mark.parametrize("name", [*CHANGES, *SAME_BINARY])
def test_starts_what_triton_would(machine: Machine, name: str) -> None:
    """First by Triton's way, then by the short one, then the base again: never another's binary."""
    for change in ({}, CHANGES.get(name) or SAME_BINARY[name], {}):
        args = arguments(change)
        for _ in range(2):
            launch(_kernel, GRID, *args, num_warps=8, num_stages=3, FLAG=True)
            _kernel[GRID](*args, num_warps=8, num_stages=3, FLAG=True, **_launch.OPTIONS)
            mine, theirs = machine.started[-2:]
            same(mine, theirs)
    assert len(machine.sources) == (2 if name in CHANGES else 1)
    assert len(_launch._compiled) == len(machine.sources), "the key tells apart what Triton tells apart, no more"


def test_constants_and_options_have_binaries_of_their_own(machine: Machine) -> None:
    args = arguments({})
    kernels = (_kernel, _other)
    choices = list(itertools.product(kernels, (4, 8), (2, 3), (True, False), (64, 128)))
    for _ in range(3):
        for kernel, warps, stages, flag, block in choices:
            launch(kernel, GRID, *args, num_warps=warps, num_stages=stages, FLAG=flag, BLOCK=block)
            kernel[GRID](*args, num_warps=warps, num_stages=stages, FLAG=flag, BLOCK=block, **_launch.OPTIONS)
            same(*machine.started[-2:])
    assert len(machine.sources) == len(choices)


def test_a_default_is_the_same_as_saying_it(machine: Machine) -> None:
    args = arguments({})
    for _ in range(2):
        launch(_kernel, GRID, *args, FLAG=True)
        launch(_kernel, GRID, *args, FLAG=True, BLOCK=64)
        same(*machine.started[-2:])
        assert machine.started[-1][-2:] == (True, 64)


def test_the_second_launch_goes_past_triton(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(_kernel, GRID, *arguments({}), FLAG=True)
    monkeypatch.setattr(type(_kernel), "run", None)
    launch(_kernel, GRID, *arguments({}), FLAG=True)
    assert len(machine.started) == 2


def test_a_profiler_sees_every_launch(machine: Machine) -> None:
    seen: list[Any] = []
    launch(_kernel, GRID, *arguments({}), FLAG=True)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launch(_kernel, GRID, *arguments({}), FLAG=True)
        assert machine.started[-1][7] is knobs.runtime.launch_enter_hook
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    launch(_kernel, GRID, *arguments({}), FLAG=True)
    assert machine.started[-1][7] is None


@pytest.mark.parametrize(
    ("grid", "full"), [((5,), (5, 1, 1)), ((5, 4), (5, 4, 1)), ((1 << 20, 65535, 2), (1 << 20, 65535, 2))]
)
def test_grids(machine: Machine, grid: tuple[int, ...], full: tuple[int, ...]) -> None:
    for _ in range(2):
        launch(_kernel, grid, *arguments({}), FLAG=True)
        assert machine.started[-1][:3] == full


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (65536, 65536)])
def test_grids_that_no_chip_takes(machine: Machine, grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at most 65535 in y and z"):
        launch(_kernel, grid, *arguments({}), FLAG=True)
    assert not machine.started


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 70000)])
def test_an_empty_grid_starts_nothing(machine: Machine, grid: tuple[int, ...]) -> None:
    launch(_kernel, grid, *arguments({}), FLAG=True)
    assert not machine.started


def test_records_what_triton_would_specialise(machine: Machine) -> None:
    """A recording gives the signature, constants and alignments that Triton hands to its compiler."""
    for name, change in (CHANGES | SAME_BINARY).items():
        args = arguments(change)
        _kernel.device_caches.clear()
        _kernel[GRID](*args, FLAG=True, **_launch.OPTIONS)
        source = machine.sources[-1]
        with _launch.recording(_launch.Target("cuda", 90, 132, 227 << 10)) as launches:
            launch(_kernel, GRID, *args, FLAG=True)
        (found,) = launches
        assert found.signature == source.signature, name
        at = {name: (position,) for position, name in enumerate(_kernel.arg_names)}
        assert {at[n]: v for n, v in found.constants.items()} == source.constants, name
        divisible = {path for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
        assert {(position,) for position in found.divisible} == divisible, name
        assert _gate.source(found).hash() == source.hash(), name
