"""Sweeps attention's tiles: each direction by itself, the others as the table has them.

Every candidate is compiled by processes side by side first, which also fills Triton's cache; what spills a lot or does
not fit the chip is left out. The rest is timed and the best printed beside the table's own choice. Nothing is changed
by this: kernels/_attention_configuration.py is edited by hand, from the figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from bench.ahead_of_time import Case as Demands
from bench.ahead_of_time import _gate
from bench.gpu.items import attention_case
from bench.gpu.record import Record
from bench.harness import Case, Clock, Run, backward_only, forward_backward, forward_only, take_turns
from fastlm.kernels import _attention_configuration as table
from fastlm.kernels._launch import Target, recording, target

TILES = [(32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (64, 256), (128, 32), (128, 64), (128, 128), (256, 64)]
"""Queries and keys. Larger ones leave no registers for anything else."""
WARPS = (4, 8)
STAGES = (2, 3, 4)
SPILLS = 256
"""Spilling instructions up to which a candidate is timed: some lie outside the loops that run."""
SHAPES = [(128, 8192), (64, 8192), (128, 2048), (64, 2048)]
"""D and S, 16 Ki tokens of 2048 channels."""
Config = table.Config


def candidates(small: bool) -> list[Config]:
    if small:
        return [Config(32, 64, 4, 2), Config(64, 32, 4, 2)]
    return [Config(m, n, warps, stages) for (m, n), warps, stages in product(TILES, WARPS, STAGES)]


class override:
    """Within the block a direction has this configuration."""

    def __init__(self, direction: str, config: Config) -> None:
        self.change = {direction: config}

    def __enter__(self) -> None:
        table.OVERRIDES.update(self.change)

    def __exit__(self, *_: Any) -> None:
        for direction in self.change:
            del table.OVERRIDES[direction]


def sift(run: Run, direction: str, configs: list[Config], target: Target) -> list[Config]:
    """Those whose kernels compile for this chip, fit it and hardly spill; all that fit where none is left."""
    chip = f"sm_{target.arch}"
    _gate.CHIPS[chip] = target
    demand, rows, owners = Demands("tune", run, narrow=None), [], []
    for config in configs:
        with override(direction, config), recording(target) as launches:
            run()
        rows += [_gate.Row("attention", demand, launch.kernel.__name__, chip, launch) for launch in launches]
        owners += [config] * len(launches)
    figures = _gate.compile_all(rows, processes=os.cpu_count() or 1, warm=True)
    broken, impossible = set(), set()
    for config, row, f in zip(owners, rows, figures, strict=True):
        if any("spilling" not in text for text in _gate.complaints(row, f)):
            impossible.add(config)
        if f.get("spills", 0) > SPILLS:
            broken.add(config)
    fit = [c for c in configs if c not in impossible]
    return [c for c in fit if c not in broken] or fit


def work(small: bool) -> Iterator[tuple[Case, str]]:
    shapes = [(64, 65)] if small else SHAPES
    tokens, channels = (65, 64) if small else (16384, 2048)
    for d, s in shapes:
        for causal in (False, True):
            for runner, directions in ((forward_only, ("forward",)), (backward_only, ("keys", "queries"))):
                case = attention_case(tokens // s, channels // d, s, d, causal, runner, torch.bfloat16)
                for direction in directions:
                    yield case, direction


def tune(record: Record, clock: Clock, until: float, small: bool) -> None:
    for case, direction in work(small):
        name = f"{case.name} {direction}"
        if name in record.done("tune"):
            continue
        if time.time() > until - 8:
            record.note("dropped", "tune", name, "out of time")
            continue
        record.start("tune", name)
        found = sweep(case, direction, clock, until, small)
        kept = [entry for entry in record.data.get("tune", []) if entry["name"] != name]
        record.set("tune", [*kept, {"name": name, **found}])
        record.finish()
        print(f"tune: {name}: {found['best']}, {found['gain']:.2f}x; {found['timed']} of {found['tried']}", flush=True)


def sweep(case: Case, direction: str, clock: Clock, until: float, small: bool) -> dict[str, Any]:
    """Seconds by configuration. "table" is the choice without an override."""
    with torch.device(clock.device):
        inputs = case.inputs()
    function = case.functions.get("triton", case.functions["fastlm"])
    tried = candidates(small)
    fit = tried
    if clock.device == "cuda":
        fit = sift(forward_backward(function, inputs), direction, tried, target(inputs[0]))
    seconds = 0.01 if small else 0.1
    times = time_one({"table": None}, direction, case.runner(function, inputs), clock, seconds)
    for config in fit:
        if time.time() > until:
            break
        run = case.runner(function, inputs)
        times |= time_one({str(tuple(config)): config}, direction, run, clock, seconds)
    best = min(times, key=times.__getitem__)
    return {
        "best": best,
        "gain": times["table"] / times[best],
        "timed": len(times) - 1,
        "tried": len(tried),
        "seconds": dict(sorted(times.items(), key=lambda pair: pair[1])),
    }


def time_one(
    named: dict[str, Config | None], direction: str, run: Run, clock: Clock, seconds: float
) -> dict[str, float]:
    """One configuration; none where the chip refuses it."""
    ((name, config),) = named.items()
    try:
        if config is None:
            return take_turns(clock, {name: clock.prepare(run)}, seconds=seconds, most=20)
        with override(direction, config):
            return take_turns(clock, {name: clock.prepare(run)}, seconds=seconds, most=20)
    except Exception as error:
        clock.settle()
        print(f"  {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return {}
