"""Host microseconds from a call in Python to the CUDA driver's launch, without a GPU.

    python -m bench.launch_cuda                  the cuda backend's ops but attention, both ways, at width 768
    python -m bench.launch_cuda gelu rms_norm    some of them
    python -m bench.launch_cuda --save           also write bench/results/launch_cuda.json

The launchers are the ones that run on a GPU; the driver below them is tests/driver/fake.cpp, which starts nothing, and
the tensors are CPU tensors. Columns, in microseconds of CPU time, the least of several rounds:

    launches   kernels started by a call
    binding    the wrapper fastlm.cuda.<op>.forward or backward, its outputs made before: checks, addresses, planning
    wrapper    with its allocations, by the CPU's allocator
    op         the public function of fastlm.ops without gradients, outputs made before; of adam an optimizer's step,
               over 24 tensors

What was tried, at width 768: an output by torch.empty(shape, dtype=, device=) 1.7, with its sizes one by one 0.9, by
new_empty without a device 0.7 (kept). The dispatcher's key from the request 1.0, from its parts 0.5 (kept).
The usual tensor's checks within matrix() and vector() instead of through address(): layer_norm's binding 4.7 to 3.4. A
call of the extension takes 0.3 with 7 arguments, so a binding by hand in place of pybind11 had too little to gain.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from bench.gpu.items import suite_cases
from bench.harness import Case, dtype_name
from fastlm import cuda
from fastlm._dispatch import Op

ROOT = Path(__file__).resolve().parent.parent
SAVED = ROOT / "bench" / "results" / "launch_cuda.json"
WIDTH = 768
SIZES: dict[str, Any] = {
    "adam": {"24 tensors": [(WIDTH, 4)] * 24},
    "cross_entropy": [(4, WIDTH)],
    "embedding": [(4, 8, WIDTH)],
    "gelu": [(4, WIDTH)],
    "glu": [(4, WIDTH)],
    "kl_div": [(4, WIDTH)],
    "layer_norm": [(4, WIDTH)],
    "rms_norm": [(4, WIDTH)],
    "rope": [(1, 4, 12, 64)],
    "softmax": [(4, WIDTH)],
}
"""The fewest rows: what is timed does not depend on them."""


# --- the stand-ins ---------------------------------------------------------------------------------------------------


def fake_driver(folder: str) -> Any:
    """libcuda.so.1 for this process, built now."""
    library, source = f"{folder}/libcuda.so.1", ROOT / "tests" / "driver" / "fake.cpp"
    command = ["g++", "-O2", "-DFAKE_QUIET", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # dlopen finds what is loaded under this name
    found.fake_launched.restype = ctypes.c_long
    found.cuCtxPushCurrent_v2(ctypes.c_void_p(0x100))  # as after torch's first touch of the GPU
    return found


@contextmanager
def installed() -> Iterator[None]:
    """Within the block backend "cuda" takes CPU tensors, in every op that has it."""
    extension = cuda.extension()
    extension.set_loader(lambda *_: b"nothing")
    rows = {op: op.rows["cuda"] for op in Op.registry.values() if "cuda" in op.rows}
    with mock.patch.multiple(cuda, _on_gpu=False):
        for op, row in rows.items():
            op.rows["cuda"] = replace(row, devices=frozenset({"cpu"}))
        try:
            with fastlm.use_backend("cuda"):
                yield
        finally:
            for op, row in rows.items():
                op.rows["cuda"] = row


@contextmanager
def allocated(run: Callable[[], Any]) -> Iterator[None]:
    """Within the block the wrappers are given the tensors that this call made, in turn."""
    made: list[Tensor] = []
    real = cuda._allocate

    def note(*arguments: Any) -> Tensor:
        made.append(real(*arguments))
        return made[-1]

    with mock.patch.object(cuda, "_allocate", note):
        run()
    again = itertools.cycle(made)
    with mock.patch.object(cuda, "_allocate", lambda *_: next(again)):
        yield


# --- what is called --------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the calls of the wrappers by "op function", with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Callable[[], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "fastlm" and args[-1] == "cuda":
            op, _, function = name.rpartition("_")
            self.found[name] = partial(getattr(Op.registry[op].module("cuda"), function), *args[:-1])
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of_adam(self) -> Iterator[None]:
        """It is called directly, because its lists of tensors would take the dispatcher long."""
        module = Op.registry["adam"].module("cuda")
        real = module.forward

        def note(*args: Any) -> Any:
            self.found["adam_forward"] = partial(real, *args)
            return real(*args)

        with mock.patch.object(module, "forward", note):
            yield


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    run, noted = case.build("fastlm")["fastlm"], Calls()
    with noted.of_adam() if case.op == "adam" else noted:
        run()
    return noted.found


def whole(case: Case) -> Callable[[], Any]:
    """The op's public function; of adam an optimizer's step."""
    function, inputs = case.functions["fastlm"], case.inputs()
    if case.op != "adam":
        return partial(function, *inputs)
    params = [torch.nn.Parameter(tensor) for tensor in inputs[1:]]
    for p in params:
        p.grad = torch.ones_like(p)
    return function(params, inputs[0])


# --- timing ----------------------------------------------------------------------------------------------------------


def micros(run: Callable[[], Any], seconds: float) -> float:
    """Of one call: the least of several rounds, because all that disturbs adds."""
    for _ in range(50):
        run()
    start = time.perf_counter()
    for _ in range(20):
        run()
    count = max(int(seconds / 10 / ((time.perf_counter() - start) / 20)), 10)
    times = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(count):
            run()
        times.append((time.process_time() - start) / count)
    return 1e6 * min(times)


def measure(case: Case, launched: Callable[[], int], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each function of the wrapper that the case calls."""
    with torch.no_grad():
        run = whole(case)
        run()
        with allocated(run):
            op = micros(run, seconds)
    for name, call in calls(case).items():
        call()
        before = launched()
        call()
        launches = launched() - before
        wrapper = micros(call, seconds)
        with allocated(call):
            binding = micros(call, seconds)
        function = name.rpartition("_")[2]
        row = {"op": case.op, "function": function, "dtype": dtype_name(case.dtype), "launches": launches}
        yield row | {"binding": binding, "wrapper": wrapper} | ({"whole": op} if function == "forward" else {})


def about() -> dict[str, Any]:
    from fastlm.info import cpu_model

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": cpu_model(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    names = sorted(name for name, op in Op.registry.items() if "cuda" in op.rows and name in SIZES)
    parser = argparse.ArgumentParser(
        prog="python -m bench.launch_cuda", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of: {', '.join(names)}")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(ROOT)}")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each figure")
    options = parser.parse_args()
    if unknown := [op for op in options.ops if op not in names]:
        parser.error(f"no op {', '.join(unknown)}; choose from {', '.join(names)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        driver = fake_driver(folder)
    rows = []
    print(f"{'op':20} {'function':9} {'dtype':9} {'launches':>8} {'binding':>8} {'wrapper':>8} {'op':>6}")
    with installed():
        for name in options.ops or names:
            for case in suite_cases(name, SIZES[name]):
                for row in measure(case, driver.fake_launched, options.seconds):
                    rows.append({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
                    op = f"{row['whole']:6.2f}" if "whole" in row else ""
                    print(
                        f"{row['op']:20} {row['function']:9} {row['dtype']:9} {row['launches']:8} "
                        f"{row['binding']:8.2f} {row['wrapper']:8.2f} {op:>6}",
                        flush=True,
                    )
    if options.save:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(about() | {"calls": []}, indent=1).removesuffix("[]\n}")
        SAVED.write_text(f"{head}[\n{lines}\n ]\n}}\n")


if __name__ == "__main__":
    main()
