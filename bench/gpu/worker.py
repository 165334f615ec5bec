"""The measuring process: python -m bench.gpu.worker STAGE --out DIR --device D --until T [--small].

A process of its own for each stage, because an illegal access leaves a CUDA context useless: the driver starts another,
which goes on with what comes after the item that killed this one.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu.clock import CudaClock, make_clock
from bench.gpu.items import Item, attention_items, op_items, train_items
from bench.gpu.record import Record
from bench.harness import OWN, Case, Clock, Result, Run, agree, dtype_name, measure_ceilings, take_turns
from fastlm._dispatch import Op

MARGIN = 8.0
"""Seconds that must be left for an item to be begun."""
Keep = Callable[[dict[str, Any]], None]


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@contextmanager
def choices() -> Iterator[set[str]]:
    """The backends that ops choose within the block."""
    found: set[str] = set()
    real = Op.select

    def select(*args: Any, **options: Any) -> str:
        name = real(*args, **options)
        found.add(name)
        return name

    with mock.patch.object(Op, "select", select):
        yield found


def build(case: Case, clock: Clock, compiled: bool) -> tuple[dict[str, Run], dict[str, str], str]:
    """Runs by provider, each with inputs of its own, warm; why others are not there; what "fastlm" runs on."""
    runs, errors, backend = {}, {}, ""
    for name in case.functions:
        if name == backend or (name == "compile" and not compiled):
            continue
        try:
            with torch.device(clock.device), choices() as chosen:
                run = case.build(name)[name]
                clock.once(run)
            runs[name] = run
            if name == "fastlm":
                backend = " ".join(sorted(chosen))
        except Exception as error:
            errors[name] = short(error)
            clock.settle()  # where the device is lost this raises too, and the process ends
    return runs, errors, backend


def measure(item: Item, clock: Clock, seconds: float, graphs: bool = True) -> tuple[Result, dict[str, bool]]:
    """The medians; and by provider whether a graph was timed."""
    case = item.case
    runs, errors, backend = build(case, clock, item.compiled)
    result, captured = Result(case, errors=errors, backend=backend), {}
    peers = {name: run for name, run in runs.items() if name not in OWN}
    for name in [name for name in runs if name in OWN] if peers else []:
        try:
            agree(case, {"fastlm": runs[name]} | peers)
        except RuntimeError as error:
            errors[name] = short(error)
            del runs[name]
    if "fastlm" not in runs:
        return result, captured
    prepared = {}
    for name, run in runs.items():
        prepared[name] = clock.prepare(run) if graphs else run
        if graphs and isinstance(clock, CudaClock):
            captured[name] = clock.captured[id(prepared[name])]
    result.medians = take_turns(clock, prepared, seconds=seconds)
    for name, run in runs.items():
        host = clock.host(run)
        if host is not None:
            result.host[name] = host
    return result, captured


def row(stage: str, result: Result, captured: dict[str, bool], ceilings: dict[str, Any]) -> dict[str, Any]:
    case, mine = result.case, result.medians.get("fastlm")
    found: dict[str, Any] = {
        "stage": stage, "name": case.name, "op": case.op, "shape": case.shape, "dtype": dtype_name(case.dtype),
        "seconds": result.medians, "host": result.host, "graph": captured, "errors": result.errors,
        "backend": result.backend, "bytes": case.bytes, "flops": case.flops,
    }  # fmt: skip
    if mine:
        found |= {"best_peer": result.best_peer, "ratio": None if math.isnan(result.ratio) else result.ratio}
    if mine and ceilings:
        rates = ceilings["product"]
        least = case.bytes / ceilings["copy"] + case.flops / rates.get(dtype_name(case.dtype), rates["float32"])
        found["share"] = least / mine
    return found


def ceilings(record: Record, clock: Clock, small: bool) -> None:
    """Random data, several times the L2; products in the dtypes the ops compute in (float32 as tf32)."""
    torch.backends.cuda.matmul.allow_tf32 = True
    memory = torch.cuda.get_device_properties(0).total_memory if clock.device == "cuda" else 8 << 30
    found = measure_ceilings(clock, *((1 << 16, 128) if small else (min(1 << 30, memory // 64), 8192)))
    torch.backends.cuda.matmul.allow_tf32 = False
    products = {dtype_name(dtype): rate for dtype, rate in found.products.items()}
    record.set("ceilings", {"copy": found.copy, "product": products | {"float16": products["bfloat16"]}})


def run_items(stage: str, items: list[Item], record: Record, clock: Clock, until: float, seconds: float) -> None:
    """Measures what time suffices for, in order; says what was dropped."""
    graphs = stage != "train"
    for item in items:
        if item.name in record.done(stage):
            continue
        if time.time() > until - MARGIN:
            record.note("dropped", stage, item.name, "out of time")
            continue
        record.start(stage, item.name)
        try:
            result, captured = measure(item, clock, seconds, graphs)
            record.add(row(stage, result, captured, record.data["ceilings"]))
            wrong = "; ".join(f"{name}: {result.errors[name]}" for name in OWN if name in result.errors)
            if wrong:
                record.note("failed", stage, item.name, wrong)
            print(f"{stage}: {item.name} {line(result)}", flush=True)
        except Exception as error:
            record.note("failed", stage, item.name, short(error))
            print(f"{stage}: {item.name} FAILED: {short(error)}", flush=True)
            clock.settle()
        record.finish()
        torch._dynamo.reset()
        gc.collect()
        if clock.device == "cuda":
            torch.cuda.empty_cache()


def line(result: Result) -> str:
    times = ", ".join(f"{name} {1e3 * t:.3f}" for name, t in result.medians.items())
    failed = "".join(f"; {name}: {why}" for name, why in result.errors.items())
    return f"ms: {times or 'none'}{failed}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__)
    parser.add_argument("stage", choices=("ceilings", "ops", "attention", "train", "tune"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    record, clock = Record(options.out), make_clock(options.device)
    seconds = 0.01 if options.small else 0.6
    if options.stage == "ceilings":
        ceilings(record, clock, options.small)
    elif options.stage == "tune":
        from bench.gpu.tune import tune

        tune(record, clock, options.until, options.small)
    else:
        items = {"ops": op_items, "attention": attention_items, "train": train_items}[options.stage](options.small)
        run_items(options.stage, items, record, clock, options.until, seconds)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # what was measured is on disk; the driver says so
