"""`--task classify`: the class of a text, by an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlm.data import ClassifiedText, Corpus, Tokenizer
from fastlm.metrics import macro_f1
from fastlm.train.config import TextOptions
from fastlm.train.tasks.encoder import EncoderTask, LabelMeasure, framed, labels_of, majority, one_file
from fastlm.train.tasks.task import Data, Measure, Model, Source, predict


class Classification(EncoderTask):
    """Tables of a text and its class; always the commonest class is what to beat."""

    name, unit = "classify", "text"

    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[ClassifiedText, float]:
        assert isinstance(source, Source)
        data = ClassifiedText.prepare(
            source.paths, folder, tokenizer or options.tokenizer, options.vocab, one_file(source.validation)
        )
        return data, majority(data)

    def open(self, folder: Path) -> ClassifiedText:
        return ClassifiedText.open(folder)

    def facts(self, data: Data) -> str:
        info = data.info
        return (
            f"{info['train_examples']:,} texts to train on, {info['validation_examples']:,} to validate, "
            f"{len(info['labels'])} classes ({_some(info['labels'])}); vocabulary {info['vocab_size']} "
            f"({info['tokenizer']})"
        )

    def decisive(self, figures: dict[str, float]) -> str:
        return "accuracy"

    def measure(self, data: Data) -> Measure:
        return _Measure(labels_of(data))

    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        return [
            f"accuracy         {figures['accuracy']:.2%} of the validation texts; {baseline:.2%} by always guessing "
            "the commonest class",
            f"macro F1         {figures['macro_f1']:.4f}, the mean over the classes",
            f"validation loss  {figures['loss']:.4f} nats per text",
        ]

    def answers(
        self, model: Model, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[str], beams: int, tokens: int
    ) -> Iterator[str]:
        """Class, tab, text: the table that could be trained on."""
        rows = [tokenizer.encode(text) for text in texts]
        guesses = predict(model, framed(tokenizer, rows, model.config.context)).argmax(-1).tolist()
        for text, guess in zip(texts, guesses, strict=True):
            yield f"{labels[guess]}\t{text}"


class _Measure(LabelMeasure):
    def figures(self) -> dict[str, float]:
        return {**super().figures(), "macro_f1": macro_f1(self.counts())}


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
