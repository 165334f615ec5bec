"""Models in these tests are tiny: on a busy machine two threads would wait for each other, not share the work."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(settings: None) -> None:
    torch.set_num_threads(1)
