"""From tensors to a running Triton kernel: every kernel of the package is started by launch().

Triton's own `kernel[grid](...)` binds, specialises and looks up by string at each call. launch() keeps the compiled
kernel under a key made of what the specialisation depends on (dtypes, 16-byte alignment, integers that are 1 or
divisible by 16, constants) and calls Triton's launcher directly; the first call for a key goes Triton's way. Host time
of a start with twelve arguments and four constants, the C launcher left out: 4.3 µs, Triton's own 9.7 (Triton 3.9.0,
python -m bench.launch).

While recording(), nothing runs: launches are noted in the configuration they would have on the target, which is how the
kernels are compiled ahead of time without a GPU (bench/ahead_of_time.py). Tensors may then be on the device "meta".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs

from fastlm.kernels._platform import INTERPRETED

if INTERPRETED:
    from fastlm.kernels import _interpreter  # noqa: F401  makes bfloat16 right there


class Target(NamedTuple):
    """What a kernel's configuration may depend on."""

    backend: str
    """cuda or hip."""
    arch: int
    """80, 90, 100, ...; 0 for hip."""
    sms: int
    """Streaming multiprocessors."""
    shared: int
    """Bytes of shared memory a block can have."""


INTERPRETER = Target("cuda", 90, 4, 227 << 10)


@functools.cache
def _target(index: int) -> Target:
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    backend, arch = ("cuda", 10 * major + minor) if torch.version.hip is None else ("hip", 0)
    return Target(backend, arch, found["multiprocessor_count"], found["max_shared_mem"])


def target(tensor: Tensor) -> Target:
    """The GPU the tensor lies on, or the one recorded for."""
    if _recording is not None:
        return _recording[0]
    return INTERPRETER if INTERPRETED else _target(tensor.get_device())


# --- memory ----------------------------------------------------------------------------------------------------------


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:  # replaced by the tests
    # Sizes one by one: torch takes twice as long to read them from a tuple.
    return torch.empty(*shape, dtype=dtype, device=device) if shape else torch.empty((), dtype=dtype, device=device)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Every output and scratch of a kernel comes from here, so that the tests can put canaries around it."""
    return _allocate(tuple(shape), dtype or like.dtype, like.device)


def tile(n: int, elements: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of tiles with this many elements (a power of two) that cover rows of n.

    The width is a power of two that divides n where one of at least 128 does, so that no lane idles.
    """
    width = n & -n if n & -n >= 128 else next_power_of_2(n)
    return max(elements // width, 1), min(width, elements)


def unit(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all: what rows and strides are counted in.

    Triton knows of an integer argument only whether 16 divides it. A kernel given size // unit and UNIT knows that UNIT
    divides their product, and loads 16 bytes at once from rows of 1000 bfloat16.
    """
    return math.gcd(16, *sizes)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whatever the first caller is in
        return torch.empty(0, dtype=dtype, device=device)


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stands for an output that was not asked for; always the same tensor, because making one costs microseconds."""
    return _nothing(dtype or like.dtype, like.device)


# --- launching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A launch as it was recorded: all that triton.compile needs."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    """Positions of the arguments that are multiples of 16."""
    num_warps: int
    num_stages: int


OPTIONS = {"enable_fp_fusion": True}
"""Multiply-adds round once. Said aloud because Triton's default changes with 3.10."""

_recording: tuple[Target, list[Launch]] | None = None
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_INT32 = 1 << 31
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Within the block launches are recorded for this target and nothing runs."""
    global _recording
    before, _recording = _recording, (target, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Starts a kernel on the current stream of the device of the first argument, a tensor.

    Args:
        kernel: the @triton.jit function; its tl.constexpr parameters come last.
        grid: programs in x, y, z; y and z at most 65535. Nothing happens where one is 0.
        args: tensors, None, ints and floats, in the kernel's order. Whoever calls has checked dtypes and devices.
        constants: the tl.constexpr parameters by name.
    """
    if 0 in grid:
        return
    if len(grid) > 1 and max(grid[1:]) > 65535:
        raise ValueError(f"grid of {kernel.__name__} must be at most 65535 in y and z, got {grid}")
    if _recording is not None:
        _recording[1].append(_record(kernel, grid, args, constants, num_warps, num_stages))
        return
    if INTERPRETED:
        with np.errstate(all="ignore"):  # a GPU does not warn that exp() overflowed
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    device = args[0].get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    # The function, because hashing a kernel itself asks for the hash of its source. An integer's part of the key is
    # never that of another kind of argument: dtypes, tuples and types are no numbers.
    key = (
        kernel.fn, device, num_warps, num_stages, *constants.items(),
        *[
            (1 if v == 1 else (0 if v & 15 else 16) + (0 if -_INT32 <= v < _INT32 else 64)) if type(v) is int
            else type(v) if v is None or type(v) is float
            else (v.dtype,) if v.data_ptr() & 15
            else v.dtype
            for v in args
        ],
    )  # fmt: skip
    found = _compiled.get(key)
    if found is None or knobs.runtime.launch_enter_hook.calls:  # a profiler wants Triton's own way
        compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constants)
        rest = [constants.get(name, _default(kernel, name)) for name in kernel.arg_names[len(args) :]]
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, rest)
        return
    run, function, metadata, rest = found
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, torch._C._cuda_getCurrentRawStream(device), function, metadata, None, None, None, *args, *rest)


def _default(kernel: Any, name: str) -> Any:
    return kernel.signature.parameters[name].default


def _record(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> Launch:
    signature, fixed, divisible = {}, {}, []
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (type(value) is int and value == 1):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.itemsize % 16 == 0:
                divisible.append(position)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -_INT32 <= value < _INT32 else "i64"
            if value % 16 == 0:
                divisible.append(position)
    for name in kernel.arg_names[len(args) :]:
        signature[name] = "constexpr"
        fixed[name] = constants[name] if name in constants else _default(kernel, name)
    return Launch(kernel, grid, signature, fixed, tuple(divisible), num_warps, num_stages)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return triton.next_power_of_2(max(n, 1))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
