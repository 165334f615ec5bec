"""`--task seq2seq`: another text for a text, such as its translation, by an encoder-decoder (Vaswani et al. 2017,
arXiv:1706.03762)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastlm.data import Corpus, ParallelText, Tokenizer, pad_sources, target_texts
from fastlm.data.parallel import PAIR_SPECIALS
from fastlm.metrics import bleu
from fastlm.models import Seq2SeqLM, Seq2SeqLMConfig
from fastlm.train.config import ModelOptions, TextOptions
from fastlm.train.tasks.task import Data, Model, Source, Task, refuse

BEAMS, PAIRS, BATCH = 4, 1024, 64
"""Hypotheses and validation pairs for the BLEU at the end of a run; pairs at a time."""


class Translation(Task):
    """Parallel text; leaving the source as it is is what to beat."""

    name = "seq2seq"
    model = Seq2SeqLM

    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[ParallelText, float]:
        assert isinstance(source, Source)
        if options.tokenizer == "word":
            raise ValueError("tokenizer must be bpe, char or byte for seq2seq: with word, rare words cannot be written")
        data = ParallelText.prepare(
            source.paths, folder, tokenizer or options.tokenizer, options.vocab, source.validation
        )
        rows, decode = range(len(data.validation.source)), data.tokenizer.decode
        sources, targets = ([decode(side[i].tolist()) for i in rows] for side in data.validation)
        return data, bleu(sources, targets)

    def open(self, folder: Path) -> ParallelText:
        return ParallelText.open(folder)

    def config(self, options: ModelOptions, data: Data | None) -> Seq2SeqLMConfig:
        refuse(options, self.name, "kv_heads")
        ids = [None] * 3 if data is None else data.tokenizer.require(*PAIR_SPECIALS)
        return Seq2SeqLMConfig(
            vocab_size=1 << 16 if data is None else data.tokenizer.vocab_size, context=options.context,
            layers=options.layers, decoder_layers=options.decoder_layers, heads=options.heads, width=options.width,
            dropout=options.dropout, label_smoothing=0.1, norm_position="pre", positions="sinusoidal",
            embed_scale=True, pad=ids[0], bos=ids[1], eos=ids[2],
        )  # fmt: skip

    def facts(self, data: Data) -> str:
        info = data.info
        return (
            f"{info['train_pairs']:,} pairs to train on, {info['validation_pairs']:,} to validate, vocabulary "
            f"{info['vocab_size']} ({info['tokenizer']})"
        )

    def conclude(
        self, model: Model, data: Data, figures: dict[str, float], targets: int, pulse: Callable[[], None]
    ) -> dict[str, float]:
        """BLEU of beam search on the validation pairs; of more than 1024, spread evenly over their lengths."""
        assert isinstance(model, Seq2SeqLM)
        context = model.config.context
        batches = data.validation_batches(BATCH, context)
        count = min(len(batches), PAIRS // BATCH)
        guessed: list[str] = []
        right: list[str] = []
        for i in range(count):
            pulse()
            batch = batches[i * len(batches) // count]
            guessed += target_texts(
                data.tokenizer, _search(model, batch["source"], batch["source_mask"], BEAMS, context)
            )
            right += target_texts(data.tokenizer, batch["targets"])
        return {"bleu": bleu(guessed, right)}

    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        return [
            f"BLEU             {figures['bleu']:.2f} on the validation pairs, beam search with {BEAMS} hypotheses; "
            f"{baseline:.2f} by leaving the source as it is",
            f"validation loss  {figures['loss']:.4f} nats per token",
        ]

    def answers(
        self, model: Model, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[str], beams: int, tokens: int
    ) -> Iterator[str]:
        """The translations; of an empty line an empty one."""
        assert isinstance(model, Seq2SeqLM)
        batch = pad_sources(tokenizer, [tokenizer.encode(text.strip()) for text in texts], model.config.context)
        found = target_texts(tokenizer, _search(model, batch["source"], batch["source_mask"], beams, tokens))
        for text, translation in zip(texts, found, strict=True):
            yield " ".join(translation.split()) if text.strip() else ""


def _search(model: Seq2SeqLM, source: Tensor, mask: Tensor, beams: int, tokens: int) -> Tensor:
    """Twice as long as the source at most, and ten tokens more: an end that is not found must not cost the context."""
    device = model.embed.weight.device
    most = min(tokens, model.config.context, 2 * source.shape[1] + 10)
    with torch.no_grad():
        return model.generate(source.to(device), most, source_mask=mask.to(device), beams=beams)
