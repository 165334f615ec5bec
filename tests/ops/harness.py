"""What the tests of every op share: the backends, the accuracy rule, and awkward layouts.

The rule: against the float64 oracle, the largest error is at most 2 times (forward) or 3 times (backward) that of eager
PyTorch in the same dtype, plus a few ulp of the largest value; and the errors lean to one side no more than chance and
eager PyTorch explain. A largest error alone does not see a truncation where rounding was meant.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import cuda, native
from fastlm._dispatch import Op, Request
from fastlm.kernels import _platform
from tests import emulation

FORWARD, BACKWARD = 2.0, 3.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

INTERPRETED = _platform.INTERPRETED
"""In a run of its own, with TRITON_INTERPRET=1: the Triton kernels in Python on CPU tensors, and nothing else."""
EMULATED = emulation.INSTALLED
"""In a run of its own, python -m tests.emulation: the CUDA kernels on CPU tensors, in every order of threads."""
ALONE = INTERPRETED or EMULATED
ON_GPU = []
if not ALONE:
    ON_GPU = [name for name, why in (("triton", _platform.missing()), ("cuda", cuda.missing())) if why is None]
GPU = bool(ON_GPU)
if EMULATED:
    KERNELS = [f"cuda-{order}" for order in emulation.ORDERS]
elif INTERPRETED:
    KERNELS = ["triton"]
else:
    KERNELS = [*(f"cpu-{isa}" for isa in native.isas()), *ON_GPU]
BACKENDS = KERNELS if ALONE else ["reference", *KERNELS]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


CHIPS = {
    "80": {"arch": 80, "shared": 163 << 10},  # A100
    "89": {"arch": 89, "shared": 99 << 10},  # 4090
}
"""What the emulation is told beside an order; it is an H100 else."""

T = TypeVar("T")


def sizes(full: T, small: T) -> T:
    """A large case for compiled kernels, and its small form for Triton's interpreter, which takes ms for a program, and
    for the emulation of CUDA, which takes 0.1 ms for a block and more."""
    return small if ALONE else full


@contextmanager
def on(backend: str) -> Iterator[None]:
    """Within the block ops run on "reference", "triton", "cuda", "cpu-<instruction set>", "cuda-<order>" or
    "cuda-<order>-<chip>"."""
    name, _, form = backend.partition("-")
    before = native.isa()
    if form and name == "cpu":
        native.set_isa(form)
    elif form:
        order, _, chip = form.partition("-")
        cuda.extension().emulate(order, **CHIPS.get(chip, {}))
    try:
        with fastlm.use_backend(name):
            yield
    finally:
        if before is not None:
            native.set_isa(before)


def refuses(op: Op, backend: str, tensor: Tensor, features: Iterable[str] = (), **sizes: int) -> bool:
    """Whether the backend declares reasons against the call; then the test must see it raise."""
    request = Request(tensor.device.type, tensor.dtype, tuple(sizes.items()), frozenset(features))
    return bool(op.explain(request).get(backend.partition("-")[0], ["the op has no such backend"]))


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the function and gradients of its floating inputs, for random upstream gradients unless given."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if upstream is None:
        upstream = upstream_for(outputs)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return [o.detach() for o in outputs], list(grads)


def upstream_for(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random gradients, the same for every dtype up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, device="cpu").to(o.device, torch.bfloat16) for o in outputs]


def assert_accurate(
    what: str,
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    factor: float,
    *,
    ulps: float = 4.0,
    independent: bool = True,
) -> None:
    """The accuracy rule of this module; `oracle` is float64, `eager` is PyTorch's result in the dtype of `actual`.

    What leans is not looked at where errors are not independent, as those that share the rounding of few statistics.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert torch.equal(actual.isfinite(), oracle.isfinite()), f"{what}: not finite in other places than the oracle"
    finite = oracle.isfinite()
    assert torch.equal(actual[~finite].double(), oracle[~finite]) or bool(oracle[~finite].isnan().all()), what
    want = oracle[finite]
    if want.numel() == 0:
        return
    error, eager_error = actual[finite].double() - want, eager.double().nan_to_num()[finite] - want
    eps, scale = torch.finfo(actual.dtype).eps, want.abs().max()
    allowed = factor * eager_error.abs().max() + ulps * eps * scale + torch.finfo(actual.dtype).tiny
    assert error.abs().max() <= allowed, (
        f"{what}: largest error {error.abs().max():.3e}, allowed {allowed:.3e} (eager {eager_error.abs().max():.3e})"
    )
    if want.numel() >= 64 and independent:
        lean, eager_lean = (error * want.sign()).mean().abs(), (eager_error * want.sign()).mean().abs()
        chance = 5 * error.std() / want.numel() ** 0.5
        allowed = factor * eager_lean + chance + 0.1 * eps * want.abs().mean()
        assert lean <= allowed, f"{what}: errors lean by {lean:.3e}, allowed {allowed:.3e} (eager {eager_lean:.3e})"


def assert_all_accurate(
    names: Sequence[str],
    actual: Sequence[Tensor],
    oracle: Sequence[Tensor],
    eager: Sequence[Tensor],
    factor: float,
    **options: Any,
) -> None:
    for name, a, o, e in zip(names, actual, oracle, eager, strict=True):
        assert_accurate(name, a, o, e, factor, **options)


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in memory laid out in ways that break careless pointer arithmetic."""
    yield "contiguous", tensor.contiguous()
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    padded[..., 1 : 1 + tensor.shape[-1]] = tensor
    yield "unaligned slice", padded[..., 1 : 1 + tensor.shape[-1]]
    if tensor.dim() >= 2:
        yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
        strided = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
        strided[::2] = tensor
        yield "every second", strided[::2]


def far_apart(elements: int) -> Tensor:
    """Zeros in bfloat16 of which only what is touched takes memory; on a GPU all of them do."""
    if torch.zeros(()).is_cuda:
        return torch.zeros(elements, dtype=torch.bfloat16)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), "a second run gave other bits"


def assert_same_values(backend: str, first: Sequence[Tensor], second: Sequence[Tensor], what: str = "layout") -> None:
    """The same bits from a kernel; the same up to summation order from the reference, which PyTorch computes."""
    for a, b in zip(first, second, strict=True):
        if backend == "reference":
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m: f"{what}: {m}")
        else:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: other bits"
