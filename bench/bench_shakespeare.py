"""tinyshakespeare with nanoGPT's published settings for a CPU: loss over the whole validation text, and the time.

    python -m bench.bench_shakespeare input.txt            our trainer alone, as `fastlm train` runs it
    python -m bench.bench_shakespeare input.txt --peer     in turns, step by step, with nanoGPT's loop in plain PyTorch
    python -m bench.bench_shakespeare input.txt --compile --precision bf16

4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps (https://github.com/karpathy/nanoGPT, README). Published:
validation loss 1.88. Run on two cores of a Xeon with AVX-512: 1.886 over the whole validation text, 126 s in all, 50 to
64 ms a step. The text is 1,115,394 characters, of which the last tenth is held out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.plain_gpt import PlainGPT
from fastlm.data import IGNORE, from_paths
from fastlm.train import PlainReporter, Progress, Trainer, shakespeare_char_cpu
from fastlm.train.run import start
from fastlm.train.trainer import is_bf16

NANOGPT_LOSS, NANOGPT_SECONDS = 1.886, 126.0


class Timed(PlainReporter):
    """Seconds of each of our steps; evaluations and checkpoints are not counted as steps."""

    def __init__(self) -> None:
        super().__init__(seconds=20)
        self.ours: list[float] = []
        self.left = 0.0

    def start(self, progress: Progress) -> None:
        super().start(progress)
        self.left = time.perf_counter()

    def step(self, progress: Progress) -> None:
        self.ours.append(time.perf_counter() - self.left)
        self.peer(progress)
        super().step(progress)
        self.left = time.perf_counter()

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        super().evaluation(step, figures)
        self.left = time.perf_counter()

    def peer(self, progress: Progress) -> None:
        """Nobody to take turns with."""


class InTurns(Timed):
    """After each of our steps one of nanoGPT's: same weights at the start, same windows, same learning rates.

    Its loop as published: windows stacked one by one from a memory map of 16-bit ids, AdamW as torch chooses it for a
    CPU with two groups, clipping, the loss read at every step, 20 batches of either split every 250 steps. Compilation
    comes before the first step and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.theirs: list[float] = []
        self.evaluations = [0.0, 0.0]
        """Seconds of ours and theirs."""

    def against(self, trainer: Trainer, compiled: bool) -> None:
        self.trainer, c = trainer, trainer.config
        plain = PlainGPT(trainer.model.config)
        plain.load_state_dict(trainer.model.state_dict())
        groups = [
            {
                "weight_decay": g["weight_decay"],
                "params": [p for p in plain.parameters() if (p.dim() > 1) == g["decays"]],
            }
            for g in trainer.optimizer.param_groups
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_bf16(c, torch.device("cpu")))
        self.ids = [np.asarray(trainer.batches.tokens, np.uint16), np.asarray(trainer.validation.tokens, np.uint16)]
        self.plain, self.model = plain, torch.compile(plain) if compiled else plain
        for training in (True, False):  # compiles
            self.model.train(training)
            with torch.set_grad_enabled(training), self.autocast:
                loss = self.model(*self.windows(0, range(c.batch)))
            if training:
                loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def windows(self, split: int, starts: Iterable[int]) -> tuple[Tensor, Tensor]:
        """As nanoGPT makes a batch."""
        ids, T = self.ids[split], self.trainer.model.config.context
        starts = list(starts)
        x = torch.stack([torch.from_numpy(ids[i : i + T].astype(np.int64)) for i in starts])
        return x, torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])

    def peer(self, progress: Progress) -> None:
        c = self.trainer.config
        starts = self.trainer.batches.starts(progress.step - 1)
        began = time.perf_counter()
        if (progress.step - 1) % 250 == 0:
            self.estimate()
            self.evaluations[1] += time.perf_counter() - began
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = progress.lr
        self.model.train()
        x, y = self.windows(0, starts)
        with self.autocast:
            loss = self.model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        self.theirs.append(time.perf_counter() - began)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        self.evaluations[0] += time.perf_counter() - self.left
        super().evaluation(step, figures)

    @torch.no_grad()
    def estimate(self) -> None:
        """20 batches of either split, as nanoGPT looks at its losses."""
        self.model.eval()
        c, T = self.trainer.config, self.trainer.model.config.context
        for split in (0, 1):
            for _ in range(20):
                with self.autocast:
                    starts = torch.randint(len(self.ids[split]) - T, (c.batch,), generator=self.generator)
                    self.model(*self.windows(split, starts.tolist())).item()

    generator = torch.Generator().manual_seed(1)
    """Of its own: ours is not to be disturbed."""

    @torch.no_grad()
    def loss(self) -> float:
        validation, total = self.trainer.validation, 0.0
        self.plain.eval()
        for i in range(len(validation)):
            x, y = validation[i].values()
            total += float(self.plain(x, y)) * int((y != IGNORE).sum())
        return total / validation.targets


@dataclass
class Race:
    reporter: Timed
    loss: float
    """Of ours over the whole validation text."""
    seconds: float
    """Of all, evaluation, checkpoints and the peer included."""

    def sums(self) -> tuple[float, float]:
        """Seconds of all steps, ours and the peer's."""
        assert isinstance(self.reporter, InTurns)
        return sum(self.reporter.ours), sum(self.reporter.theirs)


def race(text: Path, steps: int, precision: str, peer: str | None) -> Race:
    """Trains ours, in turns with a peer: "plain", "plain compiled" or None. malloc is tuned for both."""
    recipe, reporter = shakespeare_char_cpu(), InTurns() if peer else Timed()
    with tempfile.TemporaryDirectory() as folder:
        # As many tokens at each evaluation as nanoGPT looks at: 2 splits x 20 batches x 12 windows.
        train = replace(
            recipe.train, out=Path(folder), steps=steps, eval_every=250, eval_batches=8, precision=precision
        )
        run = start(replace(recipe, train=train), from_paths([text]), reporter)
        if isinstance(reporter, InTurns):
            reporter.against(run.trainer, peer == "plain compiled")
        began = time.perf_counter()
        result = run.trainer.fit()
        return Race(reporter, result.validation_loss, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="tinyshakespeare's input.txt")
    parser.add_argument("--peer", action="store_true", help="take turns with plain PyTorch")
    parser.add_argument("--compile", action="store_true", help="with plain PyTorch under torch.compile")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both; bf16 is autocast")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    peer = "plain compiled" if options.compile else "plain" if options.peer else None
    found = race(options.text, options.steps, options.precision, peer)
    reporter, ours = found.reporter, 1e3 * statistics.median(found.reporter.ours)
    print(f"validation loss {found.loss:.4f} over the whole text (nanoGPT {NANOGPT_LOSS})")
    print(f"step {ours:.1f} ms (median), {torch.get_num_threads()} threads")
    if isinstance(reporter, InTurns):
        theirs = 1e3 * statistics.median(reporter.theirs)
        print(f"{peer} in turns: loss {reporter.loss():.4f}, step {theirs:.1f} ms; ratio {theirs / ours:.2f}")
        ours, theirs = found.sums()
        print(f"all steps: {ours:.1f} s against {theirs:.1f} s; ratio {theirs / ours:.2f}")
        ours, theirs = ours + reporter.evaluations[0], theirs + reporter.evaluations[1]
        print(f"with evaluations on the way: {ours:.1f} s against {theirs:.1f} s; ratio {theirs / ours:.2f}")
    else:
        print(f"{found.seconds:.1f} s in all, evaluation and checkpoints included (nanoGPT {NANOGPT_SECONDS:.0f} s)")


if __name__ == "__main__":
    main()
