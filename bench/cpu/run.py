"""Every op beside PyTorch and torch.compile on a CPU, with what is promised of it and whether that holds.

    python -m bench cpu                        all of it: ops, memory, training steps; about 15 minutes on 2 cores
    python -m bench cpu attention "gelu bf"    items whose name has all the words of one of the arguments
    python -m bench cpu --list                 the items and their targets
    python -m bench cpu --save                 also write bench/results/cpu-<model>.json, each row as it comes
    python -m bench cpu --save --resume        only what was not yet measured at this commit: goes on after Ctrl-C

Peers take turns with fastlm in one process, with malloc as it comes and tuned on both sides; training steps take turns
between processes. An op is not timed where its tests fail: they run first, once for each state of the sources.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cpu import items as catalogue
from bench.cpu import results
from bench.cpu.items import Item
from bench.cpu.results import ROOT, Results

TIMES = {"steps": 4, "warmup": 1}
"""Of a training step: few, because the whole takes minutes."""


def line(data: dict[str, Any], row: dict[str, Any], item: Item, malloc: str) -> str:
    """What is printed of a run just measured."""
    run = row["runs"].get(malloc) or row["runs"]["tuned"]
    mine = results.ours(row, malloc)
    ratios = []
    for peer, value in run["values"].items():
        if peer == "fastlm" or not mine:
            continue
        least = [t.least for t in item.targets if (t.peer, t.malloc) == (peer, malloc)]
        verdict = f" (>= {least[0]:g}: {'holds' if value / mine >= least[0] else 'MISSED'})" if least else ""
        ratios.append(f"{peer} {value / mine:.2f}x{verdict}")
    found = results.share(data, row) if "fastlm" in run["values"] else None
    share = f"  {found[0]:.0%} of {found[1]}" if found else ""
    took = results.amount(row, mine) if mine else "?"
    return f"{item.name:50} {malloc:8} {took:>10}  {', '.join(ratios)}{share}"


class Bench:
    def __init__(self, record: Results, text: Path | None = None) -> None:
        self.record, self.text = record, text
        self.failed: list[str] = []
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:2}:{seconds:02}] {text}", flush=True)

    def add(self, item: Item, runs: dict[str, dict[str, Any]]) -> None:
        self.record.add(item, runs)
        for malloc in runs:
            self.say(line(self.record.data, self.record.row(item), item, malloc))

    def fail(self, item: Item, why: str) -> None:
        self.failed.append(item.name)
        self.say(f"{item.name}: FAILED: {why}")

    def ops(self, chosen: Sequence[Item], malloc: str) -> None:
        """Items of cases, in one process."""
        if not chosen:
            return
        self.say(f"{len(chosen)} items with malloc {malloc}: ceilings first ...")
        by_name = {item.name: item for item in chosen}
        command = [sys.executable, "-m", "bench.cpu.worker", malloc, *by_name]
        for answer in answers(command):
            if "name" not in answer:
                self.record.data["ceilings"][malloc] = answer
                products = ", ".join(f"{d} product {r / 1e9:.0f} GFLOP/s" for d, r in answer["product"].items())
                self.say(f"malloc {malloc}: bandwidth {answer['bandwidth'] / 1e9:.1f} GB/s, {products}")
                continue
            item = by_name.pop(answer.pop("name"))
            if "error" in answer:
                self.fail(item, answer["error"])
            else:
                self.add(item, {malloc: answer})
        for item in by_name.values():
            self.fail(item, "the process ended before it")

    def memory(self, item: Item) -> None:
        from bench.bench_linear_cross_entropy import peaks

        self.say(f"{item.name}: {len(item.targets) + 1} processes ...")
        providers = ["fastlm", *(target.peer for target in item.targets)]
        self.add(item, {"default": {"values": {p: float(b) for p, b in peaks(item.dtype, providers).items()}}})

    def step(self, item: Item) -> None:
        import torch

        from bench.bench_train import COMPILED, CONTENDERS, compare
        from bench.gpu.items import step_flops

        assert item.model is not None
        model = dict(item.model)
        self.say(f"{item.name}: compiling, then {TIMES['steps']} steps of {len(CONTENDERS + COMPILED)} contenders ...")
        options = argparse.Namespace(**model, **TIMES, threads=0)
        wall = compare(options, model["vocab"], "bf16", CONTENDERS + COMPILED)["wall"]
        runs: dict[str, dict[str, Any]] = {"default": {"values": {}}, "tuned": {"values": {}}}
        for name, seconds in wall.items():
            tuned = name == "fastlm" or name.endswith(" tuned")
            runs["tuned" if tuned else "default"]["values"][name.removesuffix(" tuned")] = seconds
        runs["tuned"] |= {"bytes": 0.0, "flops": step_flops(model, model["batch"])}
        torch._dynamo.reset()
        self.add(item, runs)

    def train(self, item: Item) -> None:
        import torch

        from bench import bench_shakespeare

        if self.text is None:
            return self.say(f"{item.name}: left out, it needs --text input.txt, tinyshakespeare's")
        precision = "bf16" if item.dtype == "bfloat16" else "fp32"
        values: dict[str, float] = {}
        for peer in ("plain", "plain compiled"):
            self.say(f"{item.name}: {catalogue.RUN_STEPS} steps in turns with {peer} ...")
            race = bench_shakespeare.race(self.text, catalogue.RUN_STEPS, precision, peer)
            torch._dynamo.reset()
            ours, theirs = race.sums()
            assert isinstance(race.reporter, bench_shakespeare.InTurns)
            if abs(race.loss - race.reporter.loss()) > 0.03:
                raise RuntimeError(f"validation losses differ: {race.loss} and {race.reporter.loss()} of {peer}")
            values.setdefault("fastlm", ours)
            values[peer] = values["fastlm"] * theirs / ours  # ratios are of those that took turns
        self.add(item, {"tuned": {"values": values}})

    def alone(self, item: Item) -> None:
        try:
            {"memory": self.memory, "step": self.step, "run": self.train}[item.kind](item)
        except (RuntimeError, SystemExit) as error:
            self.fail(item, str(error))


def answers(command: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The JSON lines a process prints; the rest is passed on. The process ends with the reader."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if text.startswith("{"):
                    yield json.loads(text)
                else:
                    print(text, end="")
        finally:
            process.kill()


def missing(chosen: Sequence[Item], record: Results) -> str:
    """The promises that were measured and do not hold."""
    lines = []
    for item in chosen:
        for target in item.targets:
            measured, good = results.holds(record.row(item), target)
            if measured is not None and not good:
                lines.append(
                    f"  {item.name}: {target.peer}, malloc {target.malloc}: {measured:.2f}x, promised {target.least:g}x"
                )
    return "\n".join([f"{len(lines)} promises do not hold", *lines])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench cpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help="words of an item's name (default: all items)")
    parser.add_argument("--malloc", choices=("default", "tuned"), help="ops under one setting only")
    parser.add_argument("--save", action="store_true", help="write bench/results/cpu-<model>.json")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has of this commit")
    parser.add_argument("--text", type=Path, help="tinyshakespeare's input.txt, for the training runs")
    parser.add_argument("--list", action="store_true", help="show the items and end")
    options = parser.parse_args(arguments)
    try:
        chosen = catalogue.select(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for item in chosen:
            print(item.name, *(f"[{t.peer}, {t.malloc}: {t.least:g}x]" for t in item.targets))
        return
    path = results.path_for(results.cpu_model())
    record = Results(path if options.save or options.resume else None)
    if not options.save:
        record.path = None
    bench = Bench(record, options.text)

    def wanted(item: Item, malloc: str) -> bool:
        return malloc in item.mallocs and not (options.resume and record.has(item, malloc))

    try:
        from bench.__main__ import gate

        for suite in sorted({item.suite for item in chosen} - {""}):
            gate(suite)
        for malloc in [options.malloc] if options.malloc else ("tuned", "default"):
            bench.ops([item for item in chosen if item.kind == "op" and wanted(item, malloc)], malloc)
        for item in chosen:
            if item.kind != "op" and wanted(item, ""):
                bench.alone(item)
    except KeyboardInterrupt:
        kept = f"what was measured is in {path.relative_to(ROOT)}; --resume goes on" if options.save else "not saved"
        raise SystemExit(f"\nstopped: {kept}") from None
    bench.say(missing(chosen, record))
    if options.save:
        print(f"wrote {path.relative_to(ROOT)}; python -m bench.report makes README's table of it")
    if bench.failed:
        raise SystemExit(f"failed: {'; '.join(bench.failed)}")
