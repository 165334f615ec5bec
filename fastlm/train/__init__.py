"""The trainer. Needs the extra `train`: pip install "fastlm[train]"."""

from fastlm.train.checkpoint import find_checkpoint, read_checkpoint, save_checkpoint
from fastlm.train.config import (
    PRESETS,
    InitOptions,
    ModelOptions,
    Recipe,
    TextOptions,
    TrainConfig,
    demo,
    shakespeare_char_cpu,
)
from fastlm.train.log import plot_losses, read_log
from fastlm.train.report import LiveReporter, PlainReporter, Progress, Reporter, make_reporter
from fastlm.train.schedule import learning_rate
from fastlm.train.trainer import NonFiniteLossError, Result, Trainer

__all__ = [
    "PRESETS",
    "InitOptions",
    "LiveReporter",
    "ModelOptions",
    "NonFiniteLossError",
    "PlainReporter",
    "Progress",
    "Recipe",
    "Reporter",
    "Result",
    "TextOptions",
    "TrainConfig",
    "Trainer",
    "demo",
    "find_checkpoint",
    "learning_rate",
    "make_reporter",
    "plot_losses",
    "read_checkpoint",
    "read_log",
    "save_checkpoint",
    "shakespeare_char_cpu",
]
