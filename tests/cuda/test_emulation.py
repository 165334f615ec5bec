"""The emulation of CUDA itself: right kernels give the same in every order of threads, wrong ones are found."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import emulation

each_order = pytest.mark.parametrize("order", emulation.ORDERS)
REVERSE, UNGUARDED, NEIGHBOURS, UNGUARDED_NEIGHBOURS, ROUND_TRIP = 0, 1, 10, 11, 16
SUMS = {8: 12, 32: 13, 64: 14, 256: 15}


def run(
    order: str, variant: int, given: Tensor, out: Tensor, *, dtype: int = 0, blocks: int = 1, threads: int = 256,
    cluster: int = 1, shared: int = 1024, arch: int = 90, n: int = 0, op: str = "probe",
) -> None:  # fmt: skip
    probe = ctypes.CDLL(str(emulation.build() / "libprobe.so")).probe
    probe.restype = ctypes.c_char_p
    error = probe(
        op.encode(), order.encode(), dtype, variant, ctypes.c_int64(blocks), threads, cluster, ctypes.c_int64(shared),
        arch, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n),
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())


@each_order
def test_threads_meet_at_a_barrier(order: str) -> None:
    x, y = torch.randn(256), torch.empty(256)
    run(order, REVERSE, x, y)
    assert torch.equal(y, x.flip(0))


def test_a_missing_barrier_shows_in_some_order() -> None:
    x = torch.randn(256)
    wrong = 0
    for order in emulation.ORDERS:
        y = torch.empty(256)
        run(order, UNGUARDED, x, y)
        wrong += not torch.equal(y, x.flip(0))
    assert wrong == len(emulation.ORDERS)


@each_order
def test_blocks_of_a_cluster_meet(order: str) -> None:
    x, y = torch.randn(8, 64), torch.empty(8, 64)
    run(order, NEIGHBOURS, x, y, blocks=8, threads=64, cluster=4, n=4)
    for first in (0, 4):
        assert torch.equal(y[first : first + 4], x[first : first + 4].roll(-1, 0))


def test_a_missing_barrier_of_a_cluster_shows_in_some_order() -> None:
    x = torch.randn(4, 64)
    results = []
    for order in emulation.ORDERS:
        y = torch.empty(4, 64)
        run(order, UNGUARDED_NEIGHBOURS, x, y, blocks=4, threads=64, cluster=4, n=4)
        results.append(torch.equal(y, x.roll(-1, 0)))
    assert not all(results)


@each_order
@pytest.mark.parametrize(
    ("variant", "match"),
    [
        (2, "returned before"),
        (3, "different barriers"),
        (4, "never reach|returned before"),
        (5, "whole warp"),
    ],
)
def test_divergence_is_an_error(order: str, variant: int, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        run(order, variant, torch.randn(256), torch.empty(256))
    y = torch.empty(256)  # and the next launch is none the worse for it
    run(order, REVERSE, torch.ones(256), y)
    assert torch.equal(y, torch.ones(256))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threads": 512}, "512 threads, above its launch bounds of 256"),
        ({"threads": 100}, "threads must be 32, 64"),
        ({"shared": 228 << 10}, "more shared memory than the GPU has"),
        ({"cluster": 4, "blocks": 4, "arch": 80}, "a cluster on a GPU older than sm_90"),
        ({"cluster": 4, "blocks": 6}, "multiple of the cluster"),
        ({"cluster": 3, "blocks": 3}, "1, 2, 4 or 8"),
        ({"blocks": 2**31}, r"blocks must be in \[0, 2\^31\)"),
        ({"variant": 63}, "no kernel probe_63"),
        ({"variant": 64}, "variant must be"),
    ],
)
def test_what_no_gpu_takes_is_refused(options: dict[str, int], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        run("forward", options.pop("variant", REVERSE), torch.ones(256), torch.ones(256), **options)


def test_shared_memory_starts_as_nan() -> None:
    y = torch.ones(256)
    run("forward", 9, y, y)
    assert y.isnan().all()


@each_order
@pytest.mark.parametrize("group", SUMS)
def test_reductions(order: str, group: int) -> None:
    x, y = torch.randn(256), torch.empty(2, 256)
    run(order, SUMS[group], x, y, n=256)
    rows = x.view(-1, group)
    torch.testing.assert_close(y[0].view(-1, group), rows.sum(1, keepdim=True).expand(-1, group))
    assert torch.equal(y[1].view(-1, group), rows.amax(1, keepdim=True).expand(-1, group))
    again = torch.empty(2, 256)
    run("forward", SUMS[group], x, again, n=256)
    assert torch.equal(y, again)


@pytest.mark.parametrize(("dtype", "kind"), [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)])
def test_conversions_are_torchs(dtype: int, kind: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = every * (1 + 2.0**-9)  # ties and their neighbours
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([every, halves, between, halves * (1 + 2.0**-12), bits])
    y = torch.empty(2, len(x))
    run("forward", ROUND_TRIP, x, y, dtype=dtype, blocks=-(-len(x) // (256 * 4)), n=len(x))
    want = x.to(kind).float()
    for row in y:
        assert torch.equal(row.isnan(), want.isnan())
        assert torch.equal(row.nan_to_num(1.0), want.nan_to_num(1.0))


@pytest.mark.parametrize(
    ("variant", "found"),
    [(6, "AddressSanitizer: heap-buffer-overflow"), (7, "AddressSanitizer: heap-buffer-overflow"),
     (8, "misaligned address")],
)  # fmt: skip
def test_sanitizers_end_the_process(variant: int, found: str) -> None:
    code = (
        "import torch\nfrom tests.cuda.test_emulation import run\n"
        f"x, y = torch.ones(256), torch.ones(256)\nrun('forward', {variant}, x, y)\nprint('survived')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )  # fmt: skip
    assert process.returncode != 0 and "survived" not in process.stdout
    assert found in process.stderr
