"""linear_cross_entropy against the unfused head: time, and the memory each needs beside its inputs.

python -m bench.bench_linear_cross_entropy prints the memory, each measured in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, dtype_name, pytest_suite
from bench.peers import peers
from fastlm import ops

ROOT = Path(__file__).resolve().parent.parent

SHAPES = [(768, 128, 65), (2048, 768, 50304)]
DTYPES = [torch.float32, torch.bfloat16]


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return run


def inputs(M: int, C: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = torch.randn(M, C).to(dtype), (torch.randn(V, C) * 0.02).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (M,))]


def cases(sizes: Sequence[tuple[int, int, int]] = tuple(SHAPES)) -> Iterator[Case]:
    for M, C, V in sizes:
        for dtype in DTYPES:
            yield Case(
                "linear_cross_entropy",
                f"{M}x{C}x{V}",
                dtype,
                lambda M=M, C=C, V=V, dtype=dtype: inputs(M, C, V, dtype),
                {"fastlm": ops.linear_cross_entropy, "eager": eager},
                flops=6.0 * M * C * V,
                forward=1 / 3,
            )


test_linear_cross_entropy = pytest_suite(cases)

VARIANTS = {
    "float32": (torch.float32, lambda f: f),
    "bfloat16": (torch.bfloat16, lambda f: f),
    "autocast": (torch.float32, autocast),
}
FUNCTIONS = {"fastlm": ops.linear_cross_entropy, "eager": eager, "compile": eager, **peers("linear_cross_entropy")}


def peak(variant: str, provider: str) -> int:
    """Bytes that a forward and backward holds at once beside inputs and gradients, in this process, a fresh one.

    The second run counts, because the first of a compiled function holds the compiler as well. What the first left
    behind in the allocator or in fastlm's workspace is given back before, so that it counts too.
    """
    dtype, wrap = VARIANTS[variant]
    hidden, weight, target = inputs(*SHAPES[-1], dtype)
    function = wrap(FUNCTIONS[provider])
    if provider == "compile":
        function = torch.compile(function, fullgraph=True, dynamic=False)
    for _ in range(2):
        hidden.grad = weight.grad = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        function(hidden, weight, target).backward()
    return resident("VmHWM") - before - hidden.nbytes - weight.nbytes


def resident(field: str) -> int:
    """Bytes of physical memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peaks(variant: str, providers: Sequence[str]) -> dict[str, int]:
    """peak() of each provider, each in a process of its own, with malloc as it comes."""
    command = [sys.executable, "-m", "bench.bench_linear_cross_entropy", variant]
    runs = {p: subprocess.run([*command, p], cwd=ROOT, capture_output=True, text=True) for p in providers}
    for provider, run in runs.items():
        if run.returncode:
            raise RuntimeError(f"memory of {provider}, {variant}: {run.stderr.strip()}")
    return {provider: int(run.stdout) for provider, run in runs.items()}


def main() -> None:
    if len(sys.argv) == 3:
        print(peak(*sys.argv[1:]))
        return
    size = "x".join(map(str, SHAPES[-1]))
    print(f"MB at once beside inputs and gradients at {size}, and how many times fastlm's")
    for variant, (dtype, _) in VARIANTS.items():
        found = peaks(variant, [p for p in FUNCTIONS if variant != "autocast" or p in ("fastlm", "eager")])
        cells = [f"{p} {b / 1e6:.0f} ({b / found['fastlm']:.1f}x)" for p, b in found.items()]
        print(f"{variant:>9} ({dtype_name(dtype)} inputs) {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
