"""Where the tests of the ops run: Triton's on a GPU when there is one, and alone under its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ops.harness import GPU, INTERPRETED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter only what runs on a backend: the rest has been seen in the other run."""
    if INTERPRETED:
        kept = [i for i in items if not isinstance(i, pytest.Function) or "backend" in i.fixturenames]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors of a test on "triton" are made on the GPU."""
    call = getattr(request.node, "callspec", None)
    if GPU and call is not None and call.params.get("backend") == "triton":
        with torch.device("cuda"):
            yield
    else:
        yield
