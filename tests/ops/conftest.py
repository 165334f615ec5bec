"""Where the tests of the ops run: on a GPU when there is one; alone under Triton's interpreter or CUDA's emulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ops.harness import ALONE, GPU

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter or emulation only what runs on a backend: the rest has been seen in the first run."""
    if ALONE:
        here = (ROOT / "tests" / "ops", ROOT / "tests" / "optim")
        kept = [
            i for i in items
            if i.path.parent not in here or not isinstance(i, pytest.Function) or "backend" in i.fixturenames
        ]  # fmt: skip
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors of a test on "triton" or "cuda" are made on the GPU."""
    call = getattr(request.node, "callspec", None)
    if GPU and call is not None and call.params.get("backend") in ("triton", "cuda"):
        with torch.device("cuda"):
            yield
    else:
        yield
