"""layer_norm and rms_norm in CUDA C++: what the launchers plan, and every path of the kernels, as on several GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastlm import cuda, ops
from fastlm._dispatch import Op
from fastlm.reference import layer_norm, rms_norm
from tests.emulation import ORDERS

F32, BF16 = 0, 1
H200 = {"arch": 90, "sms": 132, "shared": 227 << 10, "shared_sm": 228 << 10}
A100 = {"arch": 80, "sms": 108, "shared": 163 << 10, "shared_sm": 164 << 10}
RTX3090 = {"arch": 86, "sms": 82, "shared": 99 << 10, "shared_sm": 100 << 10}


@pytest.fixture(autouse=True)
def module() -> Iterator[Any]:
    extension = cuda.extension()
    yield extension
    extension.record(False)
    extension.emulate("forward")


def launches(module: Any, gpu: dict[str, int], call: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """Kernel and variant, blocks x, blocks y, threads, cluster, shared memory of what a call would launch."""
    module.emulate("forward", **gpu)
    module.record(True)
    getattr(module, call)(*arguments)
    noted = [(name, x, y, threads, cluster, shared) for _, _, name, x, y, threads, cluster, shared in module.records()]
    module.record(False)
    return noted


def forward(module: Any, gpu: dict[str, int], dtype: int, m: int, n: int, *, x: int = 1 << 20, residual: int = 0,
            stride: int | None = None) -> tuple[Any, ...]:  # fmt: skip
    (launch,) = launches(
        module, gpu, "norm_forward", dtype, x, n if stride is None else stride, residual, n, 1 << 21, 0, 0.0, 1 << 22,
        0, 0, 0.0, 1 << 23 if residual else 0, 1 << 24, 1 << 25, 1 << 26, m, n, 1e-5, 0, 0,
    )  # fmt: skip
    return launch


def backward(module: Any, gpu: dict[str, int], dtype: int, m: int, n: int, *, dy: int = 1 << 20, dh: int = 0,
             weight: int = 1 << 21, bias: int = 1 << 22) -> list[tuple[Any, ...]]:  # fmt: skip
    return launches(
        module, gpu, "norm_backward", dtype, dy, n, 1 << 23, n, weight, 0, 0.0, 1 << 24, 1 << 25, dh, 0, 0.0, 1 << 26,
        0, weight, bias, 1 << 27, m, n, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "m", "n", "blocks", "threads", "cluster"),
    [
        (BF16, 4096, 768, 1024, 128, 1),  # 32 threads a row
        (BF16, 4096, 1024, 1024, 128, 1),
        (F32, 4096, 1024, 2048, 128, 1),  # 64
        (BF16, 4096, 4096, 4096, 128, 1),
        (BF16, 4096, 8192, 4096, 256, 1),
        (BF16, 4096, 16384, 4096, 512, 1),
        (BF16, 100, 16385, 200, 512, 2),
        (BF16, 100, 131072, 800, 512, 8),
        (F32, 100, 65536, 800, 512, 8),
        (BF16, 1 << 20, 64, 16384, 128, 1),  # 2 threads a row
        (BF16, 1 << 20, 8, 8192, 128, 1),
        (BF16, 1, 8, 1, 32, 1),
        (BF16, 500, 64, 32, 32, 1),  # fewer rows a block rather than idle multiprocessors
        (BF16, 2**31, 1, 2**24, 128, 1),
        (BF16, 2**31 - 1, 8192, 2**31 - 1, 256, 1),
    ],
)
def test_forward_of_rows_in_registers(
    module: Any, dtype: int, m: int, n: int, blocks: int, threads: int, cluster: int
) -> None:
    name, x, y, actual_threads, actual_cluster, shared = forward(module, H200, dtype, m, n)
    wide = n % (4 if dtype == F32 else 8) == 0
    assert (name, x, y, actual_threads, actual_cluster) == (f"norm_forward_{int(wide)}", blocks, 1, threads, cluster)
    assert shared == 512


def test_instances(module: Any) -> None:
    def variant(**options: int) -> str:
        return forward(module, H200, BF16, 8, 64, **options)[0][-1]

    assert variant() == "1"
    assert variant(residual=1 << 19) == "2"
    assert variant(x=(1 << 20) + 2) == "0"
    assert variant(stride=68) == "0"
    assert variant(stride=72) == "1"
    assert variant(residual=(1 << 19) + 8) == "0"
    assert [name[-1] for name, *_ in backward(module, H200, BF16, 8, 64)] == ["1", "0"]
    assert [name[-1] for name, *_ in backward(module, H200, BF16, 8, 64, dy=18)] == ["0", "0"]
    assert [name[-1] for name, *_ in backward(module, H200, BF16, 8, 65)] == ["0", "0"]


@pytest.mark.parametrize(
    ("gpu", "dtype", "n", "shared"),
    [
        (A100, BF16, 16392, 512 + 5 * 8192),  # whole steps of 512 threads
        (A100, BF16, 81920, 512 + 20 * 8192),
        (A100, BF16, 81928, 512),  # a second read
        (RTX3090, F32, 24576, 512 + 12 * 8192),
        (RTX3090, F32, 24580, 512),
        (H200, BF16, 131080, 512),
        (H200, BF16, 2**33, 512),
    ],
)
def test_forward_of_long_rows(module: Any, gpu: dict[str, int], dtype: int, n: int, shared: int) -> None:
    assert forward(module, gpu, dtype, 7, n) == ("norm_forward_long_1", 7, 1, 512, 1, shared)


@pytest.mark.parametrize(
    ("gpu", "dtype", "m", "n", "dh", "parts", "threads", "cluster", "stages"),
    [
        (H200, BF16, 4096, 768, 0, 256, 256, 1, 3),  # 4 tiles of 4 rows for each of 256 blocks
        (H200, BF16, 4096, 1024, 1 << 28, 256, 256, 1, 3),
        (H200, BF16, 1 << 20, 1024, 0, 264, 256, 1, 3),
        (H200, BF16, 4096, 8192, 0, 128, 512, 1, 3),
        (H200, BF16, 4096, 8192, 1 << 28, 128, 512, 1, 3),
        (RTX3090, F32, 4096, 1024, 1 << 28, 158, 256, 1, 2),
        (H200, BF16, 4096, 65536, 0, 16, 512, 8, 3),
        (H200, F32, 4096, 32768, 0, 16, 512, 8, 3),
        (H200, BF16, 1, 8, 0, 1, 32, 1, 3),
        (H200, BF16, 0, 8, 0, 1, 32, 1, 3),  # the gradients of no rows are zero
        (H200, BF16, 1 << 20, 8, 0, 256, 256, 1, 3),
        (A100, BF16, 4096, 1024, 1 << 28, 205, 256, 1, 3),
        (RTX3090, BF16, 4096, 8192, 1 << 28, 82, 512, 1, 2),
    ],
)
def test_backward_of_rows_in_registers(
    module: Any, gpu: dict[str, int], dtype: int, m: int, n: int, dh: int, parts: int, threads: int, cluster: int,
    stages: int,
) -> None:  # fmt: skip
    first, second = backward(module, gpu, dtype, m, n, dh=dh)
    ring = stages * threads * 32 * (3 if dh else 2)
    assert first == ("norm_backward_1", parts * cluster, 1, threads, cluster, 512 + ring)
    assert ring >= threads * 2 * 16 * (2 if dtype == BF16 else 1)  # the sums of the rows of a tile go through it
    assert second == ("norm_parts_0", -(-n // 32), 2, 512, 1, 2048)
    assert module.norm_parts(dtype, m, n, 0) == parts


def test_backward_of_long_rows(module: Any) -> None:
    rows, columns, parts = backward(module, A100, BF16, 4096, 16384)
    assert rows == ("norm_backward_long_1", 4096, 1, 512, 1, 512 + 2 * 4 * 8192)
    assert columns == ("norm_columns_1", 8, 54, 256, 1, 0)
    assert parts == ("norm_parts_0", 512, 2, 512, 1, 2048)
    rows, columns, _ = backward(module, A100, F32, 4, 1 << 20)
    assert rows[-1] == 512
    assert columns[1:3] == (1024, 1)
    assert backward(module, H200, BF16, 9, 65544)[0][0] == "norm_backward_long_1"


def test_what_is_not_asked_for_is_not_launched(module: Any) -> None:
    for gpu, n in ((H200, 1024), (A100, 16384)):
        for bias in (0, 1 << 22):
            sums = backward(module, gpu, BF16, 64, n, weight=0, bias=bias)[1:]
            assert all((x * y > 0) == bool(bias) for _, x, y, *_ in sums)
    assert launches(module, H200, "norm_backward", BF16, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 5, 0, 0,
                    0) == []  # fmt: skip


# --- every path, run -------------------------------------------------------------------------------------------------

# One multiprocessor: all rows in a few blocks, one after the other. Small shared memory: one stage of the ring.
NEW = {"arch": 90, "sms": 3}
OLD = {"arch": 80, "sms": 2, "shared": 163 << 10, "shared_sm": 164 << 10}
SMALL = {"arch": 86, "sms": 1, "shared": 40 << 10, "shared_sm": 41 << 10}
PATHS = [
    (NEW, 37, 8),
    (NEW, 150, 100),
    (NEW, 21, 1024),
    (SMALL, 21, 1024),
    (SMALL, 5, 1001),
    (NEW, 9, 4096),
    (NEW, 5, 4104),  # float32 backward: a cluster of 2
    (OLD, 5, 4104),  # long
    (SMALL, 3, 4104),
    (NEW, 3, 8200),  # float32 forward: a cluster of 2; backward 4
    (NEW, 3, 8201),
    (NEW, 1, 32772),  # forward 8; backward long
    (NEW, 1, 65540),  # forward long
    (OLD, 3, 8200),  # long, held
    (OLD, 3, 8201),
    (SMALL, 1, 10244),  # long, read again
    (SMALL, 1, 10245),
]


@pytest.mark.parametrize("center", [True, False], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("path", range(len(PATHS)))
def test_every_path(module: Any, path: int, center: bool) -> None:
    gpu, m, n = PATHS[path]
    module.emulate(ORDERS[(path + center) % 3], **gpu)
    x, weight, bias = torch.randn(m, n) + 3, torch.randn(n), torch.randn(n)
    reference = layer_norm if center else rms_norm
    kernels = Op.registry["layer_norm" if center else "rms_norm"].module("cuda")
    dy, dh = torch.randn(m, n), torch.randn(m, n)
    plain, full = (None, None), (torch.randn(m, n), torch.tensor([123456789012345]))
    for residual, seed in (plain, full) if center else (full,):
        wide_residual = None if residual is None else residual.double()
        if center:
            given = (x, residual, weight, bias, 1e-5, seed, 0.3)
            wide = (x.double(), wide_residual, weight.double(), bias.double(), 1e-5, seed, 0.3)
        else:
            given = (x, residual, weight, 1e-5, 1.0, seed, 0.3)
            wide = (x.double(), wide_residual, weight.double(), 1e-5, 1.0, seed, 0.3)
        actual, expected = kernels.forward(*given), reference.forward(*wide)
        saved, wide_saved = actual[2:], expected[2:]
        h, wide_h = (x, x.double()) if residual is None else (actual[1], expected[1])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-5)
        stream = None if residual is None else dh
        rest = (True, seed, 0.3) if center else (1.0, seed, 0.3)
        grads = kernels.backward(dy, h, weight, *saved, stream, *rest)
        wide_grads = reference.backward(
            dy.double(), wide_h, weight.double(), *wide_saved, None if stream is None else dh.double(), *rest
        )
        for a, e in zip(grads, wide_grads, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [72, 71])
def test_parameters_of_every_dtype(module: Any, x_dtype: torch.dtype, dtype: torch.dtype, n: int) -> None:
    module.emulate("forward")
    x = torch.randn(6, n).to(x_dtype)
    weight, bias = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    wide = [t.detach().float().double().requires_grad_() for t in leaves]
    upstream = torch.randn(6, n).to(x_dtype)
    actual = ops.layer_norm(*leaves, backend="cuda")
    expected = ops.layer_norm(*wide, backend="reference")
    eps = torch.finfo(x_dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=2 * eps)
    grads = torch.autograd.grad(actual, leaves, upstream)
    wide_grads = torch.autograd.grad(expected, wide, upstream.double())
    assert [g.dtype for g in grads] == [x_dtype, dtype, dtype]
    for grad, want, eps in zip(grads, wide_grads, (torch.finfo(t).eps for t in (x_dtype, dtype, dtype)), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=4 * max(eps, 1e-6), atol=4 * max(eps, 2e-6))
