"""Timing: fastlm and its peers in one process, taking turns, so that a noisy machine is noisy for all of them alike.

A suite is a file bench_<op>.py with a function `cases()` that yields `Case`s, which cost nothing until they are built.
`pytest_suite(cases)` makes pytest-benchmark tests of it; `python -m bench` prints the table.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

Run = Callable[[], Any]
OWN = ("fastlm", "triton", "cuda", "cuda sm_80")
"""Providers that are ours: the backend that is chosen, and others that are not, by name; on sm_90 attention has the
kernels of sm_80 too."""


def forward_backward(function: Callable[..., Any], inputs: Sequence[Any]) -> Run:
    """One forward and backward with a fixed random upstream gradient; returns outputs and gradients."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        result = function(*inputs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if not upstream:
            upstream.extend(upstream_for(outputs))
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return run


def upstream_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same random gradients each time: 1 for a scalar."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)

    def random(o: Tensor) -> Tensor:
        return torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)

    return [torch.ones_like(o) if o.dim() == 0 else random(o) for o in outputs]


def backward_only(function: Callable[..., Any], inputs: Sequence[Any]) -> Run:
    """The backward of one forward, again and again; the forward runs with the first of them."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    kept: list[list[Tensor]] = []

    def run() -> list[Tensor]:
        if not kept:
            result = function(*inputs)
            outputs = list(result) if isinstance(result, tuple) else [result]
            kept.extend([outputs, upstream_for(outputs)])
        return list(torch.autograd.grad(kept[0], leaves, kept[1], retain_graph=True))

    return run


def forward_only(function: Callable[..., Any], inputs: Sequence[Any]) -> Run:
    """One forward without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


@dataclass
class Case:
    """One op on one shape and dtype."""

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Sequence[Any]]
    """Makes the arguments; tensors that require a gradient get one."""
    functions: dict[str, Callable[..., Any]]
    """By provider. "fastlm" is ours, the rest are peers; the one called "compile" is given to torch.compile."""
    bytes: float = 0.0
    """Bytes that must cross the memory bus at least once in one run."""
    flops: float = 0.0
    """Floating-point operations of the matrix products of one run."""
    forward: float = 0.0
    """The share of bytes and flops that the forward without gradients needs; 0: it is not of interest alone."""
    runner: Callable[[Callable[..., Any], Sequence[Any]], Run] = forward_backward
    tolerance: float | None = 0.25
    """Largest difference from the first peer, as a share of the largest value, or None: a last look only, and wide,
    because PyTorch's own bf16 weight gradients are off by a tenth. The op's tests are the judge of accuracy."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"

    def forward_alone(self) -> Case:
        return replace(
            self, op=f"{self.op} forward", bytes=self.bytes * self.forward, flops=self.flops * self.forward,
            forward=0.0, runner=forward_only,
        )  # fmt: skip

    def build(self, *providers: str) -> dict[str, Run]:
        """What to time, by provider (all of them unless named), on the current default device."""
        torch.manual_seed(0)
        inputs = self.inputs()
        runs = {}
        for name in providers or self.functions:
            function = self.functions[name]
            if name == "compile":
                torch._dynamo.reset()  # dynamo turns to eager silently after eight recompilations
                function = torch.compile(function, fullgraph=True, dynamic=False)
            runs[name] = self.runner(function, inputs)
        return runs


@dataclass
class Result:
    case: Case
    medians: dict[str, float] = field(default_factory=dict)
    """Seconds by provider."""
    host: dict[str, float] = field(default_factory=dict)
    """Seconds until the call returns, where work is queued to a device."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a provider was not timed."""
    backend: str = ""
    """What "fastlm" ran on, where that was looked at."""

    @property
    def best_peer(self) -> str:
        return min((n for n in self.medians if n not in OWN), key=self.medians.__getitem__, default="")

    @property
    def ratio(self) -> float:
        return self.medians[self.best_peer] / self.medians["fastlm"] if self.best_peer else float("nan")


NORM_SHAPES = [(768, 128), (4096, 768), (8192, 1024)]

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def norm_cases(
    op: str, parameters: int, plain: Pair, added: Pair, sizes: Sequence[tuple[int, int]] = NORM_SHAPES
) -> Iterator[Case]:
    """Cases of a norm with this many parameters (N,), and of its form with a residual; each pair is ours, eager."""
    for m, n in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            # Traffic in tensors: x, y, dy, x again, dx; with a residual also the residual, h and dh.
            for name, rows, (ours, eager), traffic, forward in (
                (op, 1, plain, 5, 2 / 5),
                (f"add_{op}", 2, added, 8, 4 / 8),
            ):
                shapes = [(m, n)] * rows + [(n,)] * parameters
                yield Case(
                    name,
                    f"{m}x{n}",
                    dtype,
                    lambda shapes=shapes, dtype=dtype: [torch.randn(s).to(dtype).requires_grad_() for s in shapes],
                    {"fastlm": ours, "eager": eager, "compile": eager},
                    bytes=traffic * m * n * dtype.itemsize,
                    forward=forward,
                )


def afresh(run: Run) -> Run:
    """Makes anew, untimed, what the run before destroyed: a run that works in place has a method `afresh`."""
    getattr(run, "afresh", lambda: None)()
    return run


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agree(case: Case, runs: dict[str, Run]) -> None:
    """Refuses to time a wrong result."""
    if case.tolerance is None:
        return
    peer = next(name for name in runs if name not in OWN)
    for mine, theirs in zip(_tensors(afresh(runs["fastlm"])()), _tensors(afresh(runs[peer])()), strict=True):
        wide = torch.float64 if mine.numel() < 1 << 26 else torch.float32
        mine, theirs = mine.detach().to(wide), theirs.detach().to(wide)
        if mine.shape == theirs.shape and mine.numel() == 0:
            continue
        error = ((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        if not error <= case.tolerance:
            raise RuntimeError(f"{case.name}: differs from {peer} by {error:.3g} of the largest value; not timed")


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in (result or ()) if isinstance(t, Tensor)]


class Clock:
    """Times runs on the CPU; bench/gpu/clock.py has the one of a GPU."""

    device = "cpu"

    def once(self, run: Run) -> None:
        """Runs to the end; the first run of all is to be here, where later ones are."""
        afresh(run)()

    def prepare(self, run: Run) -> Run:
        """What is timed in place of the run: the run, warm."""
        for _ in range(2):  # compilation, first touch, thread pools
            self.once(run)
        return run

    def spoil(self) -> None:
        """Fills the cache with other data."""
        self._spoiler.add_(1)

    @functools.cached_property
    def _spoiler(self) -> Tensor:
        return torch.zeros(1 << 22, device=self.device)

    def span(self, run: Run) -> Callable[[], float]:
        """Runs; the answer tells the seconds, after settle()."""
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        del result
        return lambda: seconds

    def settle(self) -> None:
        """Waits until what was started has ended."""

    def host(self, run: Run) -> float | None:
        """Seconds until a call returns, or None where that is the same as its time."""
        return None


def take_turns(
    clock: Clock, runs: dict[str, Run], *, seconds: float = 2.5, least: int = 5, most: int = 60
) -> dict[str, float]:
    """Medians of interleaved runs: every round runs each once, in turn, on a cache filled with other data."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(most):
            spans = {}
            for name in list(runs) if turn % 2 == 0 else list(reversed(runs)):
                afresh(runs[name])
                clock.spoil()
                spans[name] = clock.span(runs[name])
            clock.settle()
            for name, span in spans.items():
                times[name].append(span())
            if turn + 1 >= least and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case, *, seconds: float = 2.5, least: int = 5, most: int = 60) -> Result:
    """Refuses a wrong result, then takes turns."""
    clock, runs = Clock(), case.build()
    agree(case, runs)
    prepared = {name: clock.prepare(run) for name, run in runs.items()}
    return Result(case, take_turns(clock, prepared, seconds=seconds, least=least, most=most))


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured now: the share of it that an op reaches travels, its time does not."""

    copy: float
    """Bytes per second, read plus written, of a large copy onto memory already touched."""
    products: dict[torch.dtype, float]
    """Operations per second of a large square matrix product, by dtype."""

    def share(self, result: Result) -> float:
        """Time at the ceilings over time measured."""
        case = result.case
        least = case.bytes / self.copy + case.flops / self.products.get(case.dtype, self.products[torch.float32])
        return least / result.medians["fastlm"]


def measure_ceilings(clock: Clock | None = None, floats: int = 1 << 26, size: int = 2048) -> Ceilings:
    """The best of seven copies of so many random floats, and of square products of this size."""
    clock = clock or Clock()

    def best(run: Run) -> float:
        prepared, times = clock.prepare(run), []
        for _ in range(7):
            span = clock.span(prepared)
            clock.settle()
            times.append(span())
        return min(times)

    with torch.device(clock.device):
        source, target = torch.randn(floats), torch.zeros(floats)
        copy = 2 * source.nbytes / best(lambda: target.copy_(source))
        products = {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            out = torch.empty(size, size, dtype=dtype)
            products[dtype] = 2 * size**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    return Ceilings(copy, products)


def pytest_suite(cases: Callable[[], Iterator[Case]]) -> Callable[..., None]:
    """pytest-benchmark tests: a group per case, a row per provider."""
    rows = [(case, provider) for case in cases() for provider in case.functions]

    @pytest.mark.filterwarnings("default")  # peers warn as they like
    @pytest.mark.parametrize(("case", "provider"), rows, ids=[f"{c.name} {p}".replace(" ", "-") for c, p in rows])
    def test(benchmark: Any, case: Case, provider: str) -> None:
        benchmark.group = case.name
        if provider == "fastlm":
            agree(case, case.build(*(n for n in case.functions if n != "compile")))
        benchmark.pedantic(case.build(provider)[provider], rounds=5, warmup_rounds=2)

    return test
