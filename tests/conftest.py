"""For every test: a seed, poisoned allocations, canaries around what kernels write, and the settings put back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastlm import cuda, native
from fastlm.kernels import _platform
from fastlm.native import _workspace
from tests import emulation

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic products
CANARY = 256  # bytes on either side of a kernel's output


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel forgets to write, or reads before it is written, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs and scratch of the kernels lie between guards that no kernel may touch."""
    guards: list[tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
        payload = torch.empty(shape, dtype=dtype, device=device)  # poisoned
        if payload.is_cuda and payload.nbytes:
            guarded = torch.full((payload.nbytes + 2 * CANARY,), 42, dtype=torch.uint8, device=device)
            guards.append((guarded[:CANARY], guarded[-CANARY:]))
            return guarded[CANARY:-CANARY].view(dtype).view(shape).copy_(payload)
        if payload.nbytes == 0 or not payload.is_cpu or len(guards) >= 10_000:
            return payload
        memory = np.full(payload.nbytes + 2 * CANARY, 42, dtype=np.uint8)
        # Through numpy, because a view of a larger tensor would have a storage offset, which fake tensors do not.
        tensor = torch.from_numpy(memory[CANARY:-CANARY]).view(dtype).view(shape)
        guards.append((memory[:CANARY], memory[-CANARY:]))
        return tensor.copy_(payload)

    def allocate_like(
        shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor, strides: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        made = allocate(tuple(shape), dtype, like.device)
        return made if strides is None else made.as_strided(shape, strides)

    monkeypatch.setattr(native, "_allocate", allocate)
    monkeypatch.setattr(_workspace, "SMALLEST", 1 << 60)  # scratch too: each a new block of just its size
    if not emulation.INSTALLED:  # there AddressSanitizer knows the bounds, and sees reads as well
        monkeypatch.setattr(cuda, "_allocate", allocate_like)
    if _platform.missing() is None:
        monkeypatch.setattr("fastlm.kernels._launch._allocate", allocate)
    yield
    for before, after in guards:
        assert (before == 42).all(), "a kernel wrote before the start of a tensor"
        assert (after == 42).all(), "a kernel wrote past the end of a tensor"


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Thread count and instruction set as they were."""
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        native.set_isa(isa)
