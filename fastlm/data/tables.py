"""Reading labelled text: tables of a text and its class, columns of a word and its tag. Errors name file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TEXTS = ("sentence", "text", "review", "content")
LABELS = ("label", "class", "category", "sentiment", "target")
"""Names of the columns of a table whose first line is one of names."""


@dataclass(frozen=True)
class Example:
    """A text in one word with one label, or a sentence in its words with a label each."""

    words: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line without its end, and "FILE:NUMBER" for messages.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a line is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist; give a file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8").lstrip("\ufeff").rstrip("\r\n"), f"{path}:{number}"
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is not UTF-8 text: {error.reason}") from None


def read_classified(path: Path, labels: Sequence[str] | None = None) -> list[Example]:
    """A table as of SST-2: a line an example, its text and its class apart by a tab, in either order.

    A first line that has "label" among its fields (or class, category, sentiment, target) names the columns, of which
    there may then be more. Else there are two, and the classes' is the one with fewer different values.

    Args:
        labels: what is known as a class; None takes any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no examples; a line has another number of fields, or a class that is not known.
    """
    lines = [(line.split("\t"), where) for line, where in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no examples")
    names = [field.strip().lower() for field in lines[0][0]]
    header = any(name in LABELS for name in names)
    width = len(names) if header else 2
    for fields, where in lines:
        if len(fields) != width:
            of = "as its first line" if header else "a text and its class"
            raise ValueError(f"{where} must have {width} fields apart by tabs, {of}, got {len(fields)}")
    if header:
        text, label = _named(names, lines.pop(0)[1])
    else:
        label = min(range(2), key=lambda c: _variety([fields[c] for fields, _ in lines], labels))
        text = 1 - label
    examples = []
    for fields, where in lines:
        found = fields[label].strip()
        _check_label(found, labels, where)
        examples.append(Example((fields[text].strip(),), (found,)))
    return examples


def _named(names: list[str], where: str) -> tuple[int, int]:
    """Columns of text and class."""
    label = next(i for i, name in enumerate(names) if name in LABELS)
    texts = [i for i, name in enumerate(names) if name in TEXTS] or [i for i in range(len(names)) if i != label]
    if len(texts) != 1:
        raise ValueError(f"{where} must name one column of texts ({', '.join(TEXTS)}), got {', '.join(names)}")
    return texts[0], label


def _variety(column: list[str], labels: Sequence[str] | None) -> tuple[int, int, int]:
    """Less for what looks more like classes: known ones, few of them, short ones."""
    known = 0 if labels is None else sum(field.strip() in labels for field in column)
    return -known, len({field.strip() for field in column}), sum(map(len, column))


def read_tagged(path: Path, labels: Sequence[str] | None = None) -> list[Example]:
    """Columns as of CoNLL: a line a word, the word first and its tag last, apart by tabs or spaces, an empty line after
    each sentence. Lines of -DOCSTART- are left out.

    Args:
        labels: what is known as a tag; None takes any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no sentences; a line has one field, or a tag that is not known.
    """
    examples: list[Example] = []
    words: list[str] = []
    tags: list[str] = []

    def end() -> None:
        if words:
            examples.append(Example(tuple(words), tuple(tags)))
            words.clear()
            tags.clear()

    for line, where in read_lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            end()
            continue
        if len(fields) < 2 or not fields[0].strip():
            raise ValueError(f"{where} must have a word and its tag, apart by a tab or spaces, got {line[:40]!r}")
        tag = fields[-1].strip()
        _check_label(tag, labels, where)
        words.append(fields[0].strip())
        tags.append(tag)
    end()
    if not examples:
        raise ValueError(f"{path} has no sentences")
    return examples


def _check_label(label: str, labels: Sequence[str] | None, where: str) -> None:
    if not label:
        raise ValueError(f"{where} has no label")
    if labels is not None and label not in labels:
        some = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
        raise ValueError(f"{where} has the label {label!r}, which the training data has not; it has {some}")
