"""Learning rates against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fastlm.train import learning_rate


def rates(schedule: str, steps: int = 100, **more: float) -> list[float]:
    return [
        learning_rate(i, steps, peak=1.0, floor=0.1, warmup=10, schedule=schedule, **more)  # type: ignore[arg-type]
        for i in range(steps + 20)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps(schedule: str) -> None:
    assert rates(schedule)[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates(schedule)[10] == pytest.approx(1.0)


def test_cosine() -> None:
    found = rates("cosine")
    assert found[55] == pytest.approx(0.55)  # half way between 10 and 100
    assert found[100] == found[119] == 0.1
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_linear() -> None:
    assert rates("linear")[10:101] == pytest.approx([1 - 0.9 * i / 90 for i in range(91)])


def test_wsd_is_flat_then_falls() -> None:
    found = rates("wsd", decay=0.2)
    assert found[10:81] == [1.0] * 71
    assert found[90] == pytest.approx(0.55) and found[100] == 0.1
    assert rates("wsd", decay=1.0)[50] == pytest.approx(1 - 0.9 * 40 / 90)  # never before the warm-up ends


def test_constant_and_degenerate() -> None:
    assert set(rates("constant")[10:]) == {1.0}
    assert learning_rate(0, 0, peak=1.0, floor=0.5) == 0.5
    assert learning_rate(3, float("inf"), peak=1.0) == 1.0
    with pytest.raises(ValueError, match=r"one of cosine, linear, wsd, constant, got 'step'"):
        learning_rate(0, 10, peak=1.0, schedule="step")
