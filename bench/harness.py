"""Timing: fastlm and its peers in one process, taking turns, so that a noisy machine is noisy for all of them alike.

A suite is a file bench_<op>.py with a function `cases()` that yields `Case`s, which cost nothing until they are built.
`pytest_suite(cases)` makes pytest-benchmark tests of it; `python -m bench` prints the table.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

Run = Callable[[], Any]


def forward_backward(function: Callable[..., Any], inputs: Sequence[Any]) -> Run:
    """One forward and backward with a fixed random upstream gradient; returns outputs and gradients."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        result = function(*inputs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if not upstream:
            generator = torch.Generator().manual_seed(7)
            for o in outputs:
                upstream.append(torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, generator=generator).to(o))
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

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
    runner: Callable[[Callable[..., Any], Sequence[Any]], Run] = forward_backward
    tolerance: float | None = 0.25
    """Largest difference from the first peer, as a share of the largest value, or None: a last look only, and wide,
    because PyTorch's own bf16 weight gradients are off by a tenth. The op's tests are the judge of accuracy."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"

    def build(self, *providers: str) -> dict[str, Run]:
        """What to time, by provider (all of them unless named)."""
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

    @property
    def best_peer(self) -> str:
        return min((n for n in self.medians if n != "fastlm"), key=self.medians.__getitem__)

    @property
    def ratio(self) -> float:
        return self.medians[self.best_peer] / self.medians["fastlm"]


NORM_SHAPES = [(768, 128), (4096, 768), (8192, 1024)]

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def norm_cases(op: str, parameters: int, plain: Pair, added: Pair) -> Iterator[Case]:
    """Cases of a norm with this many parameters (N,), and of its form with a residual; each pair is ours, eager."""
    for m, n in NORM_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            # Traffic in tensors: x, y, dy, x again, dx; with a residual also the residual, h and dh.
            for name, rows, (ours, eager), traffic in ((op, 1, plain, 5), (f"add_{op}", 2, added, 8)):
                shapes = [(m, n)] * rows + [(n,)] * parameters
                yield Case(
                    name,
                    f"{m}x{n}",
                    dtype,
                    lambda shapes=shapes, dtype=dtype: [torch.randn(s).to(dtype).requires_grad_() for s in shapes],
                    {"fastlm": ours, "eager": eager, "compile": eager},
                    bytes=traffic * m * n * dtype.itemsize,
                )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agree(case: Case, runs: dict[str, Run]) -> None:
    """Refuses to time a wrong result."""
    if case.tolerance is None:
        return
    peer = next(name for name in runs if name != "fastlm")
    for mine, theirs in zip(_tensors(runs["fastlm"]()), _tensors(runs[peer]()), strict=True):
        mine, theirs = mine.detach().double(), theirs.detach().double()
        error = ((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        if not error <= case.tolerance:
            raise RuntimeError(f"{case.name}: differs from {peer} by {error:.3g} of the largest value; not timed")


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in (result or ()) if isinstance(t, Tensor)]


def measure(case: Case, *, seconds: float = 2.5, least: int = 5, most: int = 60) -> Result:
    """Medians of interleaved runs: every round runs each provider once, in turn, on a cache filled with other data."""
    runs = case.build()
    agree(case, runs)
    for run in runs.values():  # compilation, first touch, thread pools
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    spoiler = torch.zeros(1 << 22)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(most):
            for name in list(runs) if turn % 2 == 0 else list(reversed(runs)):
                spoiler.add_(1)
                begin = time.perf_counter()
                result = runs[name]()
                times[name].append(time.perf_counter() - begin)
                del result
            if turn + 1 >= least and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return Result(case, {name: statistics.median(values) for name, values in times.items()})


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


def measure_ceilings() -> Ceilings:
    def best(run: Run, repeats: int = 7) -> float:
        run()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return min(times)

    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        out = torch.empty(2048, 2048, dtype=dtype)
        products[dtype] = 2 * 2048**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
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
