"""`--task mlm`: the tokens that were hidden in plain text, by an encoder (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastlm import ops
from fastlm.data import IGNORE, Corpus, MaskedText, Tokenizer, prepare_masked
from fastlm.data.tokenizer import MASK
from fastlm.models import MaskedLM
from fastlm.train.config import TextOptions
from fastlm.train.tasks.encoder import EncoderTask, framed
from fastlm.train.tasks.lm import read_corpus
from fastlm.train.tasks.task import Batch, Data, FiniteBatches, Measure, Model, Source, predict


class MaskedModelling(EncoderTask):
    """Plain text; always guessing the commonest token is what to beat."""

    name = "mlm"

    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[MaskedText, float]:
        data = prepare_masked(read_corpus(source), folder, tokenizer or options.tokenizer, options.vocab)
        return data, _commonest(data.validation_batches(64, 64))

    def open(self, folder: Path) -> MaskedText:
        return MaskedText.open(folder)

    def measure(self, data: Data) -> Measure:
        return _Measure()

    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        return [
            f"validation loss  {figures['loss']:.4f} nats per masked token, whole validation text",
            f"accuracy         {figures['accuracy']:.2%} of the masked tokens; {baseline:.2%} by always guessing the "
            "commonest one",
        ]

    def answers(
        self, model: Model, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[str], beams: int, tokens: int
    ) -> Iterator[str]:
        """The texts with [MASK] filled in."""
        (mask,) = tokenizer.require(MASK)
        rows = [_encode(tokenizer, text, mask) for text in texts]
        batch = framed(tokenizer, rows, model.config.context)
        guessed = predict(model, batch).argmax(-1)  # (B, S)
        filled = torch.where(batch["tokens"] == mask, guessed.cpu(), batch["tokens"])
        for row, ids in zip(rows, filled.tolist(), strict=True):
            yield " ".join(tokenizer.decode(ids[1 : 1 + len(row)]).split("\n")).strip()


def _encode(tokenizer: Tokenizer, text: str, mask: int) -> list[int]:
    *parts, last = text.split(MASK)
    ids: list[int] = []
    for part in parts:
        if tokenizer.kind == "bpe":  # there a space belongs to the word behind it, which is hidden
            part = part.removesuffix(" ")
        ids += [*tokenizer.encode(part), mask]
    return ids + tokenizer.encode(last)


def _commonest(batches: FiniteBatches) -> float:
    """Share of the commonest target: the accuracy of always the same guess."""
    targets = torch.cat([batches[i]["targets"].flatten() for i in range(len(batches))])
    counts = targets[targets != IGNORE].bincount()
    return float(counts.max() / counts.sum())


class _Measure(Measure):
    """The share of hidden tokens that were guessed right beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.right: Tensor | int = 0

    def add(self, model: Model, batch: Batch) -> None:
        """Logits of the masked tokens alone: for all they would be large."""
        assert isinstance(model, MaskedLM) and model.transform is not None
        hidden = batch["targets"] != IGNORE
        targets = batch["targets"][hidden]  # (M,)
        x = model.encode(batch["tokens"], batch.get("mask"))[hidden]  # (M, C)
        logits = torch.nn.functional.linear(model.transform(x), model.embed.weight, model.bias)  # (M, V)
        self.targets = self.targets + hidden.sum()
        self.total = self.total + ops.cross_entropy(logits, targets, reduction="sum").double()
        self.right = self.right + (logits.argmax(-1) == targets).sum()

    def figures(self) -> dict[str, float]:
        return {**super().figures(), "accuracy": int(self.right) / int(self.targets)}
