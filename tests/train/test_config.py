"""TrainConfig: few fields, each explained, wrong values named."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from fastlm.train import PRESETS, ModelOptions, TextOptions, TrainConfig, demo, shakespeare_char_cpu


def test_few_fields_all_documented() -> None:
    assert len(fields(TrainConfig)) <= 30
    for kind in (TrainConfig, ModelOptions, TextOptions):
        source = inspect.getsource(kind)
        for entry in fields(kind):
            after = source.split(f"    {entry.name}: ", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{entry.name} has no text for the help"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None}, "steps and minutes are both None"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"accumulate": 1.5}, "accumulate must be an integer of at least 1, got 1.5"),
        ({"lr": float("nan")}, "lr must be finite and at least 0, got nan"),
        ({"clip": -1.0}, "clip must be finite and at least 0, got -1.0"),
        ({"minutes": 0.0}, "minutes must be finite and above 0, got 0.0"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\], got 0.0"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, wsd, constant, got 'step'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
    ],
)
def test_wrong_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_it_is_frozen_and_takes_text_for_a_path() -> None:
    config = TrainConfig(out="a/b")  # type: ignore[arg-type]
    assert config.out == Path("a/b")
    with pytest.raises(FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_presets() -> None:
    assert all(preset().model.config(300).vocab_size == 300 for preset in PRESETS.values())
    s = shakespeare_char_cpu()  # nanoGPT's README and config/train_shakespeare_char.py
    assert (s.model.layers, s.model.heads, s.model.width, s.model.context, s.model.dropout) == (4, 4, 128, 64, 0.0)
    t = s.train
    assert (t.steps, t.batch, t.lr, t.min_lr, t.warmup, t.beta2, t.weight_decay, t.clip) == (
        2000, 12, 1e-3, 1e-4, 100, 0.99, 0.1, 1.0,
    )  # fmt: skip
    assert demo().train.minutes == 2.0
