"""linear_cross_entropy against the unfused head: time, and the memory each needs beside its inputs.

python -m bench.bench_linear_cross_entropy prints the memory, measured in a process of its own for each row.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, dtype_name, pytest_suite
from fastlm import ops

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
FUNCTIONS = {"fastlm": ops.linear_cross_entropy, "eager": eager}


def peak(variant: str, provider: str) -> int:
    """Bytes by which one forward and backward raises the peak of this process, which must be fresh."""
    dtype, wrap = VARIANTS[variant]
    small, large = inputs(16, 768, 64, dtype), inputs(*SHAPES[-1], dtype)
    function = wrap(FUNCTIONS[provider])
    function(*small).backward()  # thread pools, code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    current = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    function(*large).backward()
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before) * 1024 - current


def main() -> None:
    if len(sys.argv) == 3:
        print(peak(*sys.argv[1:]))
        return
    size = "x".join(map(str, SHAPES[-1]))
    print(f"memory beside the inputs, gradients included, MB at {size}: fastlm, unfused head, share")
    for variant, (dtype, _) in VARIANTS.items():
        megabytes = []
        for provider in FUNCTIONS:
            command = [sys.executable, "-m", "bench.bench_linear_cross_entropy", variant, provider]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            megabytes.append(int(run.stdout) / 1e6)
        print(
            f"{variant:>9} ({dtype_name(dtype)} inputs) {megabytes[0]:7.0f} {megabytes[1]:7.0f} "
            f"{megabytes[0] / megabytes[1]:6.2f}"
        )


if __name__ == "__main__":
    main()
