"""What the command line takes, verb by verb; its help is made from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from fastlm.train.config import InitOptions, ModelOptions, TextOptions, TrainConfig


@dataclass(frozen=True)
class DemoOptions:
    """`fastlm demo`."""

    minutes: float = 2.0
    """Minutes of training."""
    out: Path = Path("runs/demo")
    """Folder for everything the demo writes."""
    resume: bool = False
    """Continue a demo that was stopped."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: the GPU if there is one."""
    seed: int = 1337
    """Of the weights, the order of the data and the sample."""


@dataclass(frozen=True)
class TrainOptions:
    """`fastlm train`."""

    data: Positional[tuple[Path, ...]] = ()
    """lm, mlm: text files or folders of them. classify: TSV files, label and text. tag: CoNLL files, word and tag.
    seq2seq: source and target, line by line."""
    task: Literal["lm", "mlm", "seq2seq", "classify", "tag"] = "lm"
    """What to learn: the next token, masked tokens, another text, a label, a tag for each word."""
    validation: tuple[Path, ...] = ()
    """Data to validate on, as the data to train on. None: a part of that."""
    preset: Literal["default", "demo", "shakespeare-char-cpu", "mlm", "classify", "tag", "seq2seq"] = "default"
    """Settings to start from, those of the task if none. The defaults below are those of the preset given."""
    resume: Path | None = None
    """Folder of a run to continue, with its own settings unless others are given."""
    overwrite: bool = False
    """Replace a run that --out holds already."""
    init: OmitArgPrefixes[InitOptions] = field(default_factory=InitOptions)
    text: OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class GenerateOptions:
    """`fastlm generate`."""

    folder: Positional[Path]
    """Folder of a run, or of one checkpoint."""
    prompt: str = ""
    """Text to continue, translate, label or fill in where it says [MASK]. Empty: lm begins a new one, the others take
    each line of the standard input."""
    tokens: int = 200
    """At most this many tokens."""
    beams: int = 4
    """seq2seq: hypotheses that beam search keeps. 1: always the likeliest token."""
    temperature: float = 0.8
    """0: always the likeliest token. 1: as often as the model believes. Above 1: wilder."""
    top_k: int | None = None
    """Only among the k likeliest tokens."""
    top_p: float | None = None
    """Only among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text. None: another text each time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: the GPU if there is one."""
