"""Products of warp groups and copies of tiles: right kernels give torch's numbers in every order, wrong ones fail."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests import emulation
from tests.cuda.test_emulation import each_order

HALVES = [(1, torch.bfloat16), (2, torch.float16)]
WIDTHS = (32, 64, 80, 96, 128, 176, 192, 256)
FORMS = {"along, along": 0, "along, across": 1, "across, along": 2, "across, across": 3,
         "registers, along": 4, "registers, across": 5}  # fmt: skip
PIPELINE, COPIES = 16, 17
FAULTS = {
    "no fence_async": (1, "read by the async proxy before fence_async"),
    "fence_async of one thread": (2, "read by the async proxy before fence_async"),
    "no init_done": (3, "before barrier_init_done"),
    "producer's parity": (4, "never reach: 0-0 at .* for the end of a phase of parity 0 .1 arrivals and 0 bytes"),
    "consumer's parity": (5, "changed while a product read it|more arrivals"),
    "too few bytes": (6, "16 bytes more than announced"),
    "too many bytes": (7, "never reach: .*[(]0 arrivals and 16 bytes missing"),
    "no wait for empty": (8, "more arrivals|written while a copy|changed while"),
    "no wait for full": (9, "changed while a product read it|more arrivals"),
    "released before the product": (10, "changed while a product read it"),
    "two arrivals": (11, "more arrivals|went on twice"),
    "no warpgroup_fence": (12, "without warpgroup_fence"),
    "no warpgroup_wait": (13, "before warpgroup_wait"),
    "no barrier before a store": (15, "before fence_async|changed while a tile_store"),
    "no bulk_wait": (16, "before bulk_wait_read"),
    "no bulk_commit": (17, "before bulk_wait_read"),
    "source used again": (18, "changed while a tile_store"),
    "named barrier of too many": (19, "never reach: .* at barrier 1 .128 of 256 there"),
    "too many registers": (20, "more registers than there are: "),
    "misaligned tile": (21, "multiple of 1024"),
    "misaligned operand": (22, "multiple of 1024"),
    "barrier overwritten": (23, "written over the barrier"),
    "no barrier made": (24, "nobody has made"),
    "sums written": (25, "registers were written while a product added"),
}
SUMS_USED_TOO_EARLY = 14


def described(x: Tensor, box: Sequence[int], swizzle: int) -> list[int]:
    """A matrix as the copy engine is told of it."""
    rows, columns = x.shape
    return [x.data_ptr(), columns, rows, 1, 1, 1, x.stride(0), 8, 8, 8, *box, 1, 1, 1, swizzle]


def run(
    order: str, variant: int, maps: list[list[int]], out: Tensor, *, dtype: int, threads: int, n: int, fault: int = 0,
) -> None:  # fmt: skip
    probe = ctypes.CDLL(str(emulation.build() / "libprobe.so")).probe_tiles
    probe.restype = ctypes.c_char_p
    numbers = [number for described in maps for number in described]
    error = probe(
        order.encode(), dtype, variant, threads, ctypes.c_int64(96 << 10), (ctypes.c_int64 * 48)(*numbers),
        ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(fault),
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())


@pytest.mark.parametrize(("dtype", "kind"), HALVES)
@pytest.mark.parametrize("swizzle", [128, 64])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_products(dtype: int, kind: torch.dtype, swizzle: int, n: int, form: str) -> None:
    a, b, out = torch.randn(64, 64).to(kind), torch.randn(n, 64).to(kind), torch.empty(64, n)
    stored = [x.T.contiguous() if "across" in way else x for x, way in zip((a, b), form.split(", "), strict=True)]
    maps = [described(x, (swizzle // 2, x.shape[0]), swizzle) for x in stored]
    order = emulation.ORDERS[(n + dtype) // 16 % 3]
    run(order, WIDTHS.index(n) + 8 * (swizzle == 64), [*maps, maps[0]], out, dtype=dtype, threads=128, n=FORMS[form])
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)


@each_order
@pytest.mark.parametrize(
    "corner", [(0, 0, 0, 0, 0), (7, 1, 2, 1, 1), (-8, -1, -2, 2, 3), (7, 7, 0, 0, 0), (0, 0, 0, 0, 7)]
)
def test_copies(order: str, corner: tuple[int, ...]) -> None:
    sizes, box = (4, 3, 4, 5, 80), (2, 2, 2, 3, 64)  # outermost first, as torch has them
    x = torch.randn(sizes).bfloat16()
    x = x.transpose(0, 2).contiguous().transpose(0, 2)  # strides in another order
    padded = torch.zeros(*(8 + size + 8 + n for size, n in zip(sizes, box, strict=True)), dtype=x.dtype)
    padded[tuple(slice(8, 8 + size) for size in sizes)] = x
    at = corner[::-1]
    want = padded[tuple(slice(8 + c, 8 + c + n) for c, n in zip(at, box, strict=True))].reshape(-1, 8, 8)
    out = torch.empty(128 + 24 * 32 + 128)
    out[:128] = torch.randn(128)
    described = [x.data_ptr(), *sizes[::-1], *x.stride()[-2::-1], *box[::-1], 128]
    n = sum((c + 8) << 4 * i for i, c in enumerate(corner))
    run(order, COPIES, [described] * 3, out, dtype=1, threads=128, n=n)
    rows = torch.arange(24)[:, None]
    chunks = torch.arange(8) ^ rows % 8
    got = out[128 : 128 + 24 * 32].view(torch.bfloat16).view(24, 8, 8)[rows, chunks]
    assert torch.equal(got, want)
    assert torch.equal(out[-128:], out[:128])


def pipeline(order: str, tiles: int, fault: int = 0, dtype: int = 1, kind: torch.dtype = torch.bfloat16) -> None:
    a, b = torch.randn(2, tiles * 64, 64).to(kind)
    a, b = a[: tiles * 64 - 5], b[: tiles * 64 - 5]  # the last tile leaves the tensor
    stored = torch.full((64, 64), 7, dtype=kind)
    start, out = torch.randn(2, 64, 64)
    out.copy_(start)
    maps = [described(a, (64, 64), 128), described(b, (64, 64), 128), described(stored[:50, :40], (64, 64), 128)]
    run(order, PIPELINE, maps, out, dtype=dtype, threads=384, n=tiles, fault=fault)
    want = torch.zeros(64, 64)
    for x, y in zip(a.float().split(64), b.float().split(64), strict=True):
        want[: len(x), : len(y)] += x @ y.T
    # Columns of what a thread has: 8 blocks of 4 registers, 16 bytes each.
    lane, warp, i = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(32), indexing="ij")
    row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
    added = (out - start).flatten()[(128 * (i // 4) + 32 * warp + lane) * 4 + i % 4]
    torch.testing.assert_close(added, want[row, column], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stored[:50, :40].float(), want[:50, :40].to(kind).float(), rtol=1e-2, atol=1e-3)
    stored[:50, :40] = 7
    assert torch.equal(stored, torch.full((64, 64), 7, dtype=kind))  # nothing outside the tensor


@each_order
@pytest.mark.parametrize(("dtype", "kind"), HALVES)
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_a_pipeline(order: str, tiles: int, dtype: int, kind: torch.dtype) -> None:
    pipeline(order, tiles, dtype=dtype, kind=kind)


@each_order
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_pipelines_are_errors(order: str, fault: str) -> None:
    number, match = FAULTS[fault]
    with pytest.raises(RuntimeError, match=match):
        pipeline(order, 5, number)
    pipeline(order, 1)  # and the next launch is none the worse for it


@each_order
def test_sums_are_nan_until_they_are_waited_for(order: str) -> None:
    with pytest.raises(AssertionError, match="nan"):
        pipeline(order, 5, SUMS_USED_TOO_EARLY)


def test_a_trace() -> None:
    library = ctypes.CDLL(str(emulation.build() / "libprobe.so"))
    library.probe_traced.restype = ctypes.c_char_p
    library.probe_trace(True)
    pipeline("forward", 3)
    launch, *lines = library.probe_traced().decode().splitlines()
    library.probe_trace(False)
    assert launch == f"-1 -1 launch 1 384 {96 << 10}"
    done: dict[int, list[str]] = {}
    given: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    for line in lines:
        block, thread, what, *numbers = line.split()
        assert block == "0"
        done.setdefault(int(thread), []).append(what)
        given.setdefault((int(thread), what), []).append(tuple(map(int, numbers)))
    assert sorted(done) == list(range(384))
    start = ["named_sync", "registers"]
    assert done[0] == ["init"] * 4 + ["init_done", *start] + ["wait", "expect", "load", "load"] * 3
    assert done[1] == start
    assert given[1, "named_sync"] == [(0, 384, 0)] and given[1, "registers"] == [(24, 0, 0)]
    loads = given[0, "load"]
    assert loads[:2] == loads[4:] and len({to for to, _, _ in loads}) == 4
    assert all(size == 8192 for _, size, _ in loads)
    full, empty = ([given[0, "init"][i][0] for i in (k, k + 2)] for k in (0, 1))
    assert [barrier for _, _, barrier in loads] == [full[0]] * 2 + [full[1]] * 2 + [full[0]] * 2
    assert given[0, "wait"] == [(empty[0], 1, 0), (empty[1], 1, 0), (empty[0], 0, 0)]
    assert given[128, "arrive"] == [(empty[0], 0, 0), (empty[1], 0, 0), (empty[0], 0, 0)]
    step = ["wait", "warpgroup_fence", "warpgroup_commit", "warpgroup_wait"]
    end = ["write"] * 12 + ["fence_async", "named_sync"]
    assert done[255] == [*start, *step * 3, *end]
    step[2:2] = ["multiply"] * 8  # each of the four reads A and B
    store = ["store", "bulk_commit", "store", "bulk_commit", "bulk_wait_read", "bulk_wait"]
    assert done[128] == [*start, *[*step, "arrive"] * 3, *end, *store]
    (a, _, _), (b, _, _) = loads[:2]
    assert given[160, "multiply"][:8] == [(a + 16 * 128, 16 * 128, 0), (b, 64 * 128, 0)] * 4  # of the second warp
