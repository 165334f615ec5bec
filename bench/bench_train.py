"""A training step of fastlm.models.CausalLM beside the same model in plain PyTorch (bench/plain_gpt.py).

    python -m bench.bench_train                            GPT of 6 layers, 384 wide: every vocabulary and precision
    python -m bench.bench_train --vocab 50304 --precision bf16 --steps 20
    python -m bench.bench_train --threads 1                on a busy machine, for the ratios of CPU time

One step: forward, loss, backward, clipping to norm 1, AdamW. Each contender is a process of its own, because a malloc
setting is one of the whole process; they take turns step by step, so that a noisy machine is noisy for all alike.
    fastlm       CausalLM, fastlm.optim.AdamW, tuned malloc: what fastlm's trainer does
    plain        PlainGPT, torch.optim.AdamW, malloc as it comes: what a training script does
    plain tuned  the same with tuned malloc
"plain compiled" and "plain compiled tuned" are the same under torch.compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("fastlm", "plain", "plain tuned")
COMPILED = ("plain compiled", "plain compiled tuned")


def contender(name: str, model: dict[str, Any], precision: str) -> Callable[[Tensor], Tensor]:
    """One training step as a function of tokens (batch, context + 1), which gives the loss; on the default device.

    Every contender has the same weights. "plain compiled" is PlainGPT under torch.compile. On a GPU torch's optimizer
    is its fused one.
    """
    from bench.plain_gpt import PlainGPT
    from fastlm.models import CausalLM, CausalLMConfig

    fields = {("vocab_size" if key == "vocab" else key): value for key, value in model.items() if key != "style"}
    config = getattr(CausalLMConfig, model["style"])(**fields)
    torch.manual_seed(0)
    module: nn.Module = CausalLM(config)
    settings: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    device = torch.get_default_device().type
    if name == "fastlm":
        from fastlm.optim import AdamW

        low = torch.bfloat16 if precision == "bf16" else None
        optimizer: torch.optim.Optimizer = AdamW(module.parameters(), **settings, max_norm=1.0, shadow_dtype=low)
    else:
        plain = PlainGPT(config)
        plain.load_state_dict(module.state_dict())
        module = torch.compile(plain) if name == "plain compiled" else plain  # type: ignore[assignment]
        optimizer = torch.optim.AdamW(module.parameters(), **settings, fused=True if device == "cuda" else None)

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext():
            result = module(tokens[:, :-1], tokens[:, 1:])
            loss = result.loss if name == "fastlm" else result
        loss.backward()
        if name != "fastlm":
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step.parameters = sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]
    return step


def worker(options: argparse.Namespace) -> None:
    """Runs one step for each line on stdin and answers with its seconds and loss as JSON."""
    import fastlm

    name = options.worker.removesuffix(" tuned")
    if name == "fastlm" or name != options.worker:
        fastlm.tune_malloc()
    if options.threads:
        torch.set_num_threads(options.threads)
    fields = ("style", "vocab", "context", "layers", "heads", "width", "dropout")
    step = contender(name, {field: getattr(options, field) for field in fields}, options.precision)
    generator = torch.Generator().manual_seed(1)
    print(json.dumps({"parameters": step.parameters}), flush=True)  # type: ignore[attr-defined]
    for _ in sys.stdin:
        tokens = torch.randint(options.vocab, (options.batch, options.context + 1), generator=generator)
        start, cpu = time.perf_counter(), time.process_time()
        loss = step(tokens)
        taken = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps({**taken, "loss": loss.item()}), flush=True)


def compare(
    options: argparse.Namespace, vocab: int, precision: str, contenders: Sequence[str] = CONTENDERS
) -> dict[str, Any]:
    """Median wall and CPU seconds of the contenders' steps, in turns."""
    flags = ["style", "layers", "width", "heads", "context", "batch", "dropout", "threads"]
    command = [sys.executable, "-m", "bench.bench_train", "--vocab", str(vocab), "--precision", precision]
    command += [f"--{flag}={getattr(options, flag)}" for flag in flags]
    workers = {
        name: subprocess.Popen(
            [*command, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name in contenders
    }

    def answer(name: str) -> dict:
        line = workers[name].stdout.readline()
        if not line:
            raise SystemExit(f"bench: the {name} process ended with status {workers[name].wait()}")
        return json.loads(line)

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    losses = {}
    try:
        parameters = [answer(name)["parameters"] for name in workers]
        for step in range(options.warmup + options.steps):
            for name, process in workers.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                result = answer(name)
                losses[name] = result["loss"]
                if step >= options.warmup:
                    seconds[name].append((result["wall"], result["cpu"]))
    finally:
        for process in workers.values():
            process.stdin.close()
            process.wait()
    spread = max(losses.values()) - min(losses.values())
    if not spread < 0.02:
        raise SystemExit(f"bench: after the same steps the losses differ: {losses}; a wrong result is not timed")
    wall, cpu = ({name: statistics.median(s[i] for s in steps) for name, steps in seconds.items()} for i in (0, 1))
    return {"parameters": parameters[0], "wall": wall, "cpu": cpu, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--style", choices=("gpt2", "llama"), default="gpt2")
    for name, default in {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--vocab", type=int, action="append", help="default: 65 and 50304")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), action="append", help="bf16 is autocast; default: both"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--worker", choices=CONTENDERS + COMPILED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.vocab, options.precision = options.vocab[0], options.precision[0]
        return worker(options)
    threads = options.threads or torch.get_num_threads()
    shape = f"{options.style}, {options.layers} layers, {options.width} wide, batch {options.batch} x {options.context}"
    print(f"{shape}, {threads} threads, torch {torch.__version__}; medians of {options.steps} steps")
    heads = ("fastlm ms", "plain ms", "ratio", "of CPU", "tuned ms", "ratio", "of CPU")
    print(f"{'vocabulary':>10} {'precision':>9}" + "".join(f"{head:>11}" for head in heads))
    for vocab in options.vocab or (65, 50304):
        for precision in options.precision or ("fp32", "bf16"):
            result = compare(options, vocab, precision)
            wall, cpu = result["wall"], result["cpu"]
            cells = [f"{1e3 * wall['fastlm']:.0f}"]
            for peer in CONTENDERS[1:]:
                cells.append(f"{1e3 * wall[peer]:.0f}")
                cells += [f"{taken[peer] / taken['fastlm']:.2f}x" for taken in (wall, cpu)]
            print(f"{vocab:10} {precision:>9}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
