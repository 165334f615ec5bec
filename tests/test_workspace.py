"""Scratch lent to kernels: kept, bounded, never lent twice, and never part of what a caller gets."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastlm
from fastlm import native
from fastlm.native import _workspace

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, canaries: None) -> Iterator[None]:
    """As it is outside of tests, and empty."""
    monkeypatch.setattr(_workspace, "SMALLEST", 1 << 18)
    fastlm.release_workspace()
    yield
    fastlm.release_workspace()


def test_a_block_is_kept_for_the_next_call_and_released_on_request() -> None:
    with native.workspace(MEGABYTE) as first:
        assert first.shape == (MEGABYTE,) and first.dtype is torch.float32 and _workspace.held() == 0
        address = first.data_ptr()
    assert _workspace.held() == 4 * MEGABYTE
    with native.workspace(2 * MEGABYTE - 5, torch.bfloat16) as second:
        assert second.data_ptr() == address and second.shape == (2 * MEGABYTE - 5,)
    fastlm.release_workspace()
    assert _workspace.held() == 0


def test_small_scratch_is_left_to_the_heap() -> None:
    with native.workspace(100):
        pass
    assert _workspace.held() == 0


def test_blocks_are_at_most_a_quarter_too_large() -> None:
    for size in [*range(1, 300), 1 << 20, (1 << 20) + 1, 12_345_678]:
        assert size <= _workspace.bucket(size) <= size * 1.25 + 1


def test_a_nested_call_gets_another_block_and_an_exception_gives_both_back() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        native.workspace(MEGABYTE) as outer,
        native.workspace(MEGABYTE) as inner,
    ):
        outer.fill_(1)
        inner.fill_(2)
        assert outer.data_ptr() != inner.data_ptr() and outer.sum() == MEGABYTE
        raise ZeroDivisionError
    assert _workspace.held() == 8 * MEGABYTE


def test_threads_have_blocks_of_their_own_which_end_with_them() -> None:
    addresses = []

    def work() -> None:
        with native.workspace(MEGABYTE) as scratch:
            addresses.append(scratch.data_ptr())
        assert _workspace.held() == 8 * MEGABYTE

    with native.workspace(MEGABYTE) as mine:
        addresses.append(mine.data_ptr())
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    gc.collect()
    assert len(set(addresses)) == 2 and _workspace.held() == 4 * MEGABYTE


def test_what_inference_mode_borrowed_first_can_be_written_to_outside() -> None:
    with torch.inference_mode(), native.workspace(MEGABYTE) as scratch:
        scratch.zero_()
    with native.workspace(MEGABYTE) as scratch:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8), out=scratch[:64].view(8, 8))
        assert (scratch[:64] == 8).all()


def test_a_fake_block_is_not_kept() -> None:
    with FakeTensorMode(), native.workspace(MEGABYTE):
        pass
    assert _workspace.held() == 0


def test_no_more_is_held_than_a_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "peak", lambda: 10 * 10 * MEGABYTE * len(_workspace.POOLS))
    _workspace._local.pool.most = 0
    for count in range(1, 9):
        with native.workspace(count * MEGABYTE, torch.uint8):
            pass
        assert _workspace.held() <= 10 * MEGABYTE
    assert 8 * MEGABYTE in _workspace._local.pool.free  # the last one stays
    with native.workspace(50 * MEGABYTE, torch.uint8):
        pass
    assert _workspace.held() == 0
    _workspace._local.pool.most = 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="another source of the peak")
def test_the_peak_is_not_the_parents() -> None:
    ballast = torch.ones(64 << 20)  # 256 MB, and a child begins with its parent's getrusage()
    own = "from fastlm.native import _workspace; print(_workspace.peak())"
    child = subprocess.run([sys.executable, "-c", own], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) < _workspace.peak() - ballast.nbytes // 2


CHANGING = """
import sys, torch
from fastlm import ops
from fastlm.native import _workspace
from pathlib import Path
if sys.argv[1] == "without":
    _workspace.SMALLEST = 1 << 60
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def head(rows, vocab):
    h, w = torch.randn(rows, 64, requires_grad=True), torch.randn(vocab, 64, requires_grad=True)
    ops.linear_cross_entropy(h, w, torch.randint(vocab, (rows,))).backward()
def heads(length):
    q, k, v = (torch.randn(1, 4, length, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    ops.attention(q, k, v, causal=True).sum().backward()
most = 0
for i in range(12):
    head(900 + 90 * i, 16000 - 800 * i); heads(300 + 100 * i)
    most = max(most, resident())
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read in /proc")
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_resident_memory_grows_by_less_than_a_fifth_under_changing_shapes() -> None:
    most = {}
    for how in ("with", "without"):
        command = [sys.executable, "-c", CHANGING, how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        most[how] = int(done.stdout)
    assert most["with"] < 1.2 * most["without"], most


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_copies() -> None:
    with native.workspace(MEGABYTE) as scratch:
        scratch.zero_()
    child = os.fork()
    if child == 0:
        with native.workspace(MEGABYTE) as scratch:
            scratch.data_ptr()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
