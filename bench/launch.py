"""Host microseconds of a kernel's start, without a GPU: fastlm.kernels' launch() beside Triton's kernel[grid](...).

    python -m bench.launch

The compiler and what comes after Triton's Python (its launcher in C, the driver) are stand-ins, the same for both. The
kernel has twelve arguments and four constants. Medians of interleaved rounds, CPU time.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastlm.kernels import _launch


class Machine:
    """Compiler and driver of a chip that is not there."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        """Arguments of every start."""
        self.sources: list[Any] = []
        self.utils = SimpleNamespace()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 1234

    def compile(self, source: Any, **_: Any) -> SimpleNamespace:
        self.sources.append(source)
        return SimpleNamespace(
            run=lambda *args: self.started.append(args),
            function=f"binary {len(self.sources)}",
            packed_metadata=("metadata", len(self.sources)),
            launch_metadata=lambda *_: None,
        )

    def installed(self) -> ExitStack:
        """Within the block Triton and torch see this machine; CPU tensors are on its device -1."""
        stack = ExitStack()
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", self))
        stack.enter_context(mock.patch("triton.compiler.compile", self.compile))
        for name, function in (("_cuda_getDevice", lambda: -1), ("_cuda_getCurrentRawStream", lambda device: 1234)):
            stack.enter_context(mock.patch.object(torch._C, name, function, create=True))
        stack.enter_context(mock.patch.object(_launch, "_compiled", {}))
        return stack


@triton.jit
def _kernel(
    x, y, w, b, mean, rstd, none, M, N, x_stride, y_stride, eps,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) * eps)


def main() -> None:
    machine = Machine()
    machine.started = SimpleNamespace(append=lambda args: None)  # type: ignore[assignment]
    tensors = [torch.empty(64) for _ in range(6)]
    args = [*tensors, None, 4096, 768, 768, 768, 1e-5]
    constants = {"HAS_BIAS": True, "ROWS": 4, "BLOCK": 1024, "STORE": True}

    def ours() -> None:
        _launch.launch(_kernel, (4096,), *args, num_warps=4, num_stages=2, **constants)

    def tritons() -> None:
        _kernel[(4096,)](*args, num_warps=4, num_stages=2, **_launch.OPTIONS, **constants)

    calls, times = 2000, {"launch()": [], "kernel[grid](...)": []}  # type: ignore[var-annotated]
    with machine.installed():
        for function in (ours, tritons, ours):
            function()
        for _ in range(25):
            for name, function in zip(times, (ours, tritons), strict=True):
                start = time.process_time()
                for _ in range(calls):
                    function()
                times[name].append((time.process_time() - start) / calls * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    text = ", ".join(f"{name} {micros:.1f} µs" for name, micros in medians.items())
    print(f"Triton {triton.__version__}: {text}")


if __name__ == "__main__":
    main()
