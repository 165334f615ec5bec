"""tinyshakespeare with nanoGPT's published settings for a CPU: loss over the whole validation text, and the time.

    python -m bench.bench_shakespeare input.txt            our trainer alone, as `fastlm train` runs it
    python -m bench.bench_shakespeare input.txt --peer     in turns, step by step, with nanoGPT's loop in plain PyTorch

4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps (https://github.com/karpathy/nanoGPT, README). Published:
validation loss 1.88. Run on two cores of a Xeon with AVX-512: 1.886 over the whole validation text, 126 s in all, 50 to
64 ms a step. The text is 1,115,394 characters, of which the last tenth is held out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.plain_gpt import PlainGPT
from fastlm.data import IGNORE, from_paths
from fastlm.train import PlainReporter, Progress, Trainer, shakespeare_char_cpu
from fastlm.train.run import start

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

    def evaluation(self, step: int, loss: float) -> None:
        super().evaluation(step, loss)
        self.left = time.perf_counter()

    def peer(self, progress: Progress) -> None:
        """Nobody to take turns with."""


class InTurns(Timed):
    """After each of our steps one of nanoGPT's: same weights at the start, same batches, same learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs: list[float] = []

    def against(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.model = PlainGPT(trainer.model.config)
        self.model.load_state_dict(trainer.model.state_dict())
        groups = [
            {"weight_decay": g["weight_decay"], "params": self.parameters(g["decays"])}
            for g in trainer.optimizer.param_groups
        ]
        c = trainer.config
        self.optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2))

    def parameters(self, decays: bool) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if (p.dim() > 1) == decays]

    def peer(self, progress: Progress) -> None:
        began, c = time.perf_counter(), self.trainer.config
        for group in self.optimizer.param_groups:
            group["lr"] = progress.lr
        x, y = self.trainer.batches[progress.step - 1]
        self.model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.theirs.append(time.perf_counter() - began)

    @torch.no_grad()
    def loss(self) -> float:
        validation, total = self.trainer.validation, 0.0
        self.model.eval()
        for i in range(len(validation)):
            x, y = validation[i]
            total += float(self.model(x, y)) * int((y != IGNORE).sum())
        return total / validation.targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="tinyshakespeare's input.txt")
    parser.add_argument("--peer", action="store_true", help="take turns with plain PyTorch")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    recipe, reporter = shakespeare_char_cpu(), InTurns() if options.peer else Timed()
    with tempfile.TemporaryDirectory() as folder:
        train = replace(recipe.train, out=Path(folder), steps=options.steps)
        run = start(replace(recipe, train=train), from_paths([options.text]), reporter)
        if isinstance(reporter, InTurns):
            reporter.against(run.trainer)
        began = time.perf_counter()
        result = run.trainer.fit()
        seconds = time.perf_counter() - began
    loss, ours = result.validation_loss, 1e3 * statistics.median(reporter.ours)
    print(f"validation loss {loss:.4f} over the whole text (nanoGPT {NANOGPT_LOSS})")
    print(f"step {ours:.1f} ms (median), {torch.get_num_threads()} threads")
    if isinstance(reporter, InTurns):
        theirs = 1e3 * statistics.median(reporter.theirs)
        print(f"plain PyTorch in turns: loss {reporter.loss():.4f}, step {theirs:.1f} ms; ratio {theirs / ours:.2f}")
        print(f"all steps: {sum(reporter.ours):.1f} s against {sum(reporter.theirs):.1f} s")
    else:
        print(f"{seconds:.1f} s in all, evaluation and checkpoints included (nanoGPT {NANOGPT_SECONDS:.0f} s)")


if __name__ == "__main__":
    main()
