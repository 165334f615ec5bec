"""Text from a trained model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.data import Tokenizer, load_tokenizer
from fastlm.models import CausalLM
from fastlm.train.checkpoint import find_checkpoint, read_checkpoint
from fastlm.train.tasks import TASKS, Model, Task

_PARTIAL = "\ufffd"


@dataclass(frozen=True)
class Trained:
    """A checkpoint, ready for use.

    Attributes:
        labels: of classify and tag.
    """

    task: Task
    model: Model
    tokenizer: Tokenizer
    labels: tuple[str, ...]

    def answers(self, texts: Sequence[str], beams: int, tokens: int) -> Iterator[str]:
        """As Task.answers()."""
        return self.task.answers(self.model, self.tokenizer, self.labels, texts, beams, tokens)


def load_model(folder: str | Path, device: str = "cpu") -> Trained:
    """What a checkpoint holds, or the best one of a run's folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or model and tokenizer do not belong together.
    """
    found = find_checkpoint(folder)
    meta = read_checkpoint(found)
    task = TASKS[meta.get("task", "lm")]
    tokenizer = load_tokenizer(found)
    model = task.model.load(found, device)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{found}: the model has a vocabulary of {model.config.vocab_size}, its tokenizer of {tokenizer.vocab_size}"
        )
    return Trained(task, model.eval(), tokenizer, tuple(meta.get("labels", ())))


def stream_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str = "",
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """What follows the prompt, in pieces that are whole characters. Ends early where the model ends its text.

    Args:
        prompt: empty to begin a new text.
        tokens: at most this many.
        temperature, top_k, top_p: as CausalLM.stream.
        seed: the same seed gives the same text; None draws one.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    ids = tokenizer.encode(prompt)
    if not ids:
        ids = [tokenizer.separator] if tokenizer.separator is not None else tokenizer.encode("\n")
    steps = model.stream(
        torch.tensor([ids], device=device), tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, eos=tokenizer.separator,
    )  # fmt: skip
    pending: list[int] = []
    for step in steps:
        token = int(step[0])
        if token == tokenizer.separator:
            break
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith(_PARTIAL) and len(pending) < 8:  # perhaps half a character: wait for the rest
            continue
        yield text
        pending = []
    if pending:
        yield tokenizer.decode(pending)
