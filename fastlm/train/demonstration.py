"""`fastlm demo`: a language model of Python sources, from nothing to a sample, in about two minutes of training."""

from __future__ import annotations

import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from fastlm import native
from fastlm._dispatch import Op, Request, UnsupportedError
from fastlm.data import standard_library
from fastlm.models import CausalLM
from fastlm.train.config import Recipe
from fastlm.train.generate import load_model, stream_text
from fastlm.train.report import Reporter, clock
from fastlm.train.run import Run, finish, holds_run, resume, start, summary
from fastlm.train.trainer import Result, is_bf16, pick_device

PROMPT = "def read_"
MEGABYTES = 12.0  # all of it on most Pythons: two minutes read less than half, and variety helps

ANNOUNCEMENT = """\
A small language model learns Python from the sources of this interpreter's standard library. Nothing is downloaded.
Expect about 15 seconds of preparation, then {length} of training. On two CPU cores two minutes bring the loss from \
8.3 to about 4.4 nats per token, 1.8 to 2.1 bits per byte. A byte bigram, which guesses each byte from the last one, \
spends about 3.6.
{out} gets checkpoints, loss.png, TensorBoard events and log.jsonl. Ctrl-C saves and says how to resume."""


def run_demo(recipe: Recipe, reporter: Reporter, again: bool = False, sample: int = 160) -> tuple[Run, Result]:
    """Corpus, tokenizer, training, evaluation, plot, sample; tells the reporter all along.

    Args:
        recipe: of fastlm.train.demo(), or with other values.
        again: resume the run in recipe.train.out instead of starting anew.
        sample: tokens to generate at the end.
    """
    say, config = reporter.message, recipe.train
    device = pick_device(config.device)
    length = f"{config.minutes:g} minutes" if config.minutes is not None else f"{config.steps} steps"
    width = min(100, shutil.get_terminal_size().columns)
    for paragraph in ANNOUNCEMENT.format(length=length, out=config.out).splitlines():
        say(textwrap.fill(paragraph, width))
    say("")
    run = resume(recipe, reporter) if again else _start(recipe, reporter)
    model = run.trainer.model
    precision = torch.bfloat16 if is_bf16(config, device) else torch.float32
    say(f"Model: {recipe.model.style} style, {model.num_parameters() / 1e6:.1f} million weights, seed {config.seed}.")
    say(f"Ops on {device.type} ({native.isa() or 'no kernels built'}), {torch.get_num_threads()} threads:")
    for line in backend_table(device, precision):
        say("  " + line)
    say("")
    result = run.trainer.fit()
    if result.stopped != "finished":
        return run, result
    say("")
    say(summary(run, result))
    plot = finish(run)
    _show_sample(run, sample, say)
    folder = run.folder
    say(f"checkpoint   {folder / 'best'}: model.safetensors, config.json, tokenizer.json")
    say(f"loss plot    {plot}")
    say(f"TensorBoard  tensorboard --logdir {folder / 'tensorboard'}")
    say(f"more text    fastlm generate {folder} --prompt 'import '")
    say(f"Done: {result.steps} steps in {clock(result.seconds)}.")
    return run, result


def _start(recipe: Recipe, reporter: Reporter) -> Run:
    say, folder = reporter.message, recipe.train.out
    if holds_run(folder):
        say(f"The run that was in {folder} makes way for a new one.")
    began = time.perf_counter()
    corpus = standard_library(MEGABYTES)
    sizes = [f"{size / 1e6:.1f} MB in {len(side)} files" for size, side in
             zip(corpus.bytes, (corpus.train, corpus.validation), strict=True)]  # fmt: skip
    say(f"Corpus: {corpus.source} ({corpus.licence}), {sizes[0]} to train on, {sizes[1]} to validate.")
    run = start(recipe, corpus, reporter, overwrite=True)
    info = run.data.info
    say(
        f"Tokens: byte-level BPE, {info['vocab_size']} of them, {info['train_bytes'] / info['train_tokens']:.2f} bytes "
        f"each; {info['train_tokens'] / 1e6:.1f} million to train on. ({time.perf_counter() - began:.0f} s)"
    )
    return run


def backend_table(device: torch.device, dtype: torch.dtype) -> Iterable[str]:
    """For each op the backend that runs it, and why that one: aligned lines."""
    rows = []
    for name, op in sorted(Op.registry.items()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.append((name, *op.why(Request(device.type, dtype))))
        except UnsupportedError as error:  # forced, or strict; the call itself will raise
            rows.append((name, "none", str(error)))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"{name:<{widths[0]}}  {backend:<{widths[1]}}  {why}" for name, backend, why in rows]


def _show_sample(run: Run, tokens: int, say: Callable[[str], None]) -> None:
    found, seed = load_model(run.folder, str(run.trainer.device)), run.recipe.train.seed
    assert isinstance(found.model, CausalLM)
    text = "".join(stream_text(found.model, found.tokenizer, PROMPT, tokens, temperature=0.7, top_k=50, seed=seed))
    say("")
    say(f"A sample that continues {PROMPT!r}:")
    say("")
    for line in (PROMPT + text).splitlines():
        say("  | " + line)
    say("")
