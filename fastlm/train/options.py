"""What the command line takes, verb by verb; its help is made from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from fastlm.train.config import ModelOptions, TextOptions, TrainConfig


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
    """Text files, or folders of text files."""
    preset: Literal["default", "demo", "shakespeare-char-cpu"] = "default"
    """Settings to start from. The defaults below are those of the preset given."""
    resume: Path | None = None
    """Folder of a run to continue, with its own settings unless others are given."""
    overwrite: bool = False
    """Replace a run that --out holds already."""
    text: OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    train: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class GenerateOptions:
    """`fastlm generate`."""

    folder: Positional[Path]
    """Folder of a run, or of one checkpoint."""
    prompt: str = ""
    """Text to continue. Empty: begin a new one."""
    tokens: int = 200
    """At most this many tokens."""
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
