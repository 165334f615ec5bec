"""`--task tag`: a tag for each word, by an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlm.data import Corpus, TaggedText, Tokenizer
from fastlm.data.tokenizer import MASK
from fastlm.metrics import span_scores
from fastlm.train.config import TextOptions
from fastlm.train.tasks.encoder import EncoderTask, LabelMeasure, framed, labels_of, majority, one_file
from fastlm.train.tasks.task import Batch, Data, Measure, Model, Source, predict


class Tagging(EncoderTask):
    """Columns of words and tags; always the commonest tag is what to beat."""

    name, unit = "tag", "word"

    def prepare(
        self, source: Source | Corpus, folder: Path, options: TextOptions, tokenizer: Tokenizer | None
    ) -> tuple[TaggedText, float]:
        assert isinstance(source, Source)
        data = TaggedText.prepare(
            source.paths, folder, tokenizer or options.tokenizer, options.vocab, one_file(source.validation)
        )
        return data, majority(data)

    def open(self, folder: Path) -> TaggedText:
        return TaggedText.open(folder)

    def facts(self, data: Data) -> str:
        info = data.info
        return (
            f"{info['train_examples']:,} sentences to train on, {info['validation_examples']:,} to validate, "
            f"{len(info['labels'])} tags; vocabulary {info['vocab_size']} ({info['tokenizer']})"
        )

    def decisive(self, figures: dict[str, float]) -> str:
        return "span_f1" if "span_f1" in figures else "accuracy"

    def measure(self, data: Data) -> Measure:
        return _Measure(labels_of(data))

    def summary(self, data: Data, figures: dict[str, float], baseline: float) -> list[str]:
        lines = [
            f"accuracy         {figures['accuracy']:.2%} of the validation words; {baseline:.2%} by always guessing "
            "the commonest tag",
            f"validation loss  {figures['loss']:.4f} nats per word",
        ]
        if "span_f1" in figures:
            lines.insert(0, f"span F1          {figures['span_f1']:.4f}, of whole entities")
        return lines

    def answers(
        self, model: Model, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[str], beams: int, tokens: int
    ) -> Iterator[str]:
        """A word, a tab, its tag, line by line, and an empty line: the columns that could be trained on.

        Words are what stands between spaces.
        """
        for text in texts:
            lines = []
            for words, batch, places in _pieces(tokenizer, text.split(), model.config.context):
                tags = predict(model, batch).argmax(-1)[0].tolist()
                lines += [f"{word}\t{labels[tags[place]]}" for word, place in zip(words, places, strict=True)]
            yield "\n".join([*lines, ""])


def _pieces(tokenizer: Tokenizer, words: Sequence[str], context: int) -> Iterator[tuple[list[str], Batch, list[int]]]:
    """A sentence in as many pieces as the context needs: words, their batch, the place of each in it."""
    taken: list[str] = []
    row: list[int] = []
    places: list[int] = []
    for i, word in enumerate(words):
        ids = tokenizer.encode(f" {word}" if i else word) or tokenizer.require(MASK)  # as LabelledText encodes them
        if taken and len(row) + len(ids) > context - 2:
            yield taken, framed(tokenizer, [row], context), places
            taken, row, places = [], [], []
        taken.append(word)
        places.append(1 + len(row))  # after [CLS]
        row += ids
    if taken:
        yield taken, framed(tokenizer, [row], context), places


class _Measure(LabelMeasure):
    def figures(self) -> dict[str, float]:
        figures = super().figures()
        if any(label.startswith(("B-", "I-")) for label in self.labels):
            right, guessed = ([[self.labels[i] for i in row] for row in rows] for rows in (self.right, self.guessed))
            figures["span_f1"] = span_scores(right, guessed)[0].f1
        return figures
