"""The models of these tests are small: fastlm's kernels run in them all the same."""

from __future__ import annotations

import pytest

from fastlm.patching import _layers


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "as_shipped" not in request.fixturenames:
        monkeypatch.setattr(_layers, "few", lambda x, limit: False)


@pytest.fixture
def as_shipped() -> None:
    """Small calls go to torch, as they do for users."""
