"""Times of work queued to a GPU: events around replays of a CUDA graph, on an L2 cache filled with other data.

A graph takes the host's part out of the time, as it is when a training step keeps the queue full; the host's
microseconds are measured beside it. What cannot be captured is timed as it comes, which the row then says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.harness import Clock, Run

HOST_CALLS = 10
HOST_SECONDS = 0.1
"""After which no further calls are timed on the host: what runs that long is not waiting for it."""


class CudaClock(Clock):
    device = "cuda"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """cuda: torch.cuda, or what stands in for it where there is no GPU."""
        self.cuda = cuda
        self.stream = cuda.Stream()
        cache = getattr(cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
        with torch.device(self.device):
            self._data = torch.ones(4 * cache // 4)
        self.captured: dict[int, bool] = {}
        """By id of what prepare() returned, whether it is a graph."""

    def once(self, run: Run) -> None:
        """On the side stream: autograd runs a backward where its forward ran, and that must be the stream captured."""
        with self.cuda.stream(self.stream):
            run()
        self.cuda.synchronize()

    def prepare(self, run: Run) -> Run:
        """A graph's replay, or the run itself where it cannot be captured."""
        for _ in range(3):
            self.once(run)
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph, stream=self.stream):
                run()
            replay = graph.replay
        except RuntimeError:
            self.cuda.synchronize()
            replay = run
        prepared = lambda: replay()  # noqa: E731  an object of its own, kept by whoever times it
        self.captured[id(prepared)] = replay is not run
        return prepared

    def spoil(self) -> None:
        """By reading: lines written here would be written back at the cost of whoever comes next."""
        with self.cuda.stream(self.stream):
            self._data.sum()

    def span(self, run: Run) -> Callable[[], float]:
        begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        with self.cuda.stream(self.stream):
            begin.record()
            run()
            end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def settle(self) -> None:
        self.cuda.synchronize()

    def host(self, run: Run) -> float | None:
        times, start = [], time.perf_counter()
        with self.cuda.stream(self.stream):
            while len(times) < 5 and (not times or time.perf_counter() - start < HOST_SECONDS):
                self.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(HOST_CALLS):
                    run()
                times.append((time.perf_counter() - begin) / HOST_CALLS)
        self.cuda.synchronize()
        return statistics.median(times)


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else Clock()
