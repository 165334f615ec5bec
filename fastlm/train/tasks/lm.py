"""`--task lm`: the next token of plain text, by a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from fastlm.data import Corpus, Dataset, Tokenizer, from_paths, prepare
from fastlm.metrics import bigram_bits_per_byte, bits_per_byte, perplexity
from fastlm.models import CausalLM, CausalLMConfig
from fastlm.train.config import ModelOptions, TextOptions
from fastlm.train.tasks.task import Data, Model, Source, Task, refuse


class LanguageModelling(Task):
    """Plain text; the byte bigram is what to beat."""

    name = "lm"
    model = CausalLM

    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[Dataset, float]:
        corpus = read_corpus(source)
        data = prepare(corpus, folder, tokenizer or options.tokenizer, options.vocab)
        return data, bigram_bits_per_byte(corpus.train, corpus.validation)

    def open(self, folder: Path) -> Dataset:
        return Dataset.open(folder)

    def config(self, options: ModelOptions, data: Data | None) -> CausalLMConfig:
        refuse(options, self.name, "decoder_layers")
        return options.config(1 << 16 if data is None else data.tokenizer.vocab_size)

    def conclude(
        self, model: Model, data: Data, figures: dict[str, float], targets: int, pulse: Callable[[], None]
    ) -> dict[str, float]:
        loss = figures["loss"]
        bpb = bits_per_byte(loss * targets, data.info["validation_bytes"])
        return {"perplexity": perplexity(loss), "bits_per_byte": bpb}

    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        lines = [f"validation loss  {figures['loss']:.4f} nats per token, whole validation text"]
        if math.isfinite(figures["perplexity"]):
            lines.append(
                f"perplexity       {figures['perplexity']:.2f} per token, of {data.tokenizer.vocab_size} tokens"
            )
        verdict = "below" if figures["bits_per_byte"] < baseline else "NOT below"
        return [
            *lines,
            f"bits per byte    {figures['bits_per_byte']:.3f}",
            f"byte bigram      {baseline:.3f} bits per byte on the same text; the model is {verdict} it",
        ]


def read_corpus(source: Source | Corpus) -> Corpus:
    """Plain text."""
    return source if isinstance(source, Corpus) else from_paths(source.paths, validation=source.validation)
