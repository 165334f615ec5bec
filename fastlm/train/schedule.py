"""Learning rates: pure functions of the step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def learning_rate(
    step: int,
    total: float,
    *,
    peak: float,
    floor: float = 0.0,
    warmup: int = 0,
    schedule: str = "cosine",
    decay: float = 0.2,
) -> float:
    """The learning rate of a step.

    For the first `warmup` steps it rises linearly: peak * (step + 1) / (warmup + 1). From there to `total`, with r
    going from 0 to 1:

    - cosine: floor + (peak - floor) * (1 + cos(pi r)) / 2 (Loshchilov and Hutter 2016, arXiv:1608.03983)
    - linear: peak + (floor - peak) * r
    - wsd: warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): peak, then linear to floor over the last `decay`
      of the steps
    - constant: peak

    Args:
        step: counted from 0.
        total: steps in all; may be an estimate, where the clock ends the run.
        peak, floor: highest learning rate, and the one at the end.
        warmup: steps.
        schedule: cosine, linear, wsd or constant.
        decay: share of all steps that wsd decays in, in (0, 1].

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    if step >= total:
        return floor
    if schedule == "wsd":
        start = max(total * (1 - decay), warmup)
        ratio = max(0.0, (step - start) / (total - start))
    else:
        ratio = (step - warmup) / (total - warmup)
    if schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * ratio))
    return peak + (floor - peak) * ratio
