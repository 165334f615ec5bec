"""Where the tests of the ops run: on a GPU when there is one; alone under Triton's interpreter or CUDA's emulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastlm._dispatch import NAMES, Op
from tests.ops.harness import ALONE, GPU

ROOT = Path(__file__).resolve().parents[2]


def absent(item: pytest.Item) -> bool:
    """Whether a test asks for a backend that the op of its file has not."""
    call = getattr(item, "callspec", None)
    backend = str(call.params.get("backend", "")).partition("-")[0] if call is not None else ""
    name = item.path.stem.removeprefix("test_")
    ops = [op for op in Op.registry if name == op or name.startswith(f"{op}_")]
    return bool(backend in NAMES and ops and backend not in Op.registry[max(ops, key=len)].rows)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each op on the backends it has; under the interpreter or emulation nothing but what runs on a backend: the rest
    has been seen in the first run."""
    here = (ROOT / "tests" / "ops", ROOT / "tests" / "optim")
    kept = [
        i for i in items
        if i.path.parent not in here or not isinstance(i, pytest.Function)
        or (("backend" in i.fixturenames or not ALONE) and not absent(i))
    ]  # fmt: skip
    if len(kept) < len(items):
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
