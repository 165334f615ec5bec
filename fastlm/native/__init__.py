"""Wrappers of the C++ extension: tensor to pointer, sizes, strides, threads.

A raw pointer trusts its caller: with a wrong dtype it corrupts the heap, from a fake tensor it is null. So `address`
looks before it gives one; `output` is for what `empty` just allocated.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from fastlm._walk import rows
from fastlm.native import _workspace
from fastlm.native._workspace import Loan

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_extension: ModuleType | None
try:
    _extension = importlib.import_module("fastlm._C")
except ModuleNotFoundError as error:
    if error.name != "fastlm._C":
        raise
    _extension = None  # installed without a compiler; any other failure to load it is a fault and raises


def missing() -> str | None:
    """Why the CPU kernels cannot be used, or None."""
    if _extension is None:
        return ("fastlm._C is not built for this Python (no C++17 compiler was found when fastlm was installed, "
                f"or it was built for another Python than {platform.python_version()})")  # fmt: skip
    return None


def extension() -> Any:
    """The C++ extension, fastlm._C."""
    if _extension is None:
        raise ImportError(missing())
    return _extension


def isas() -> list[str]:
    """Instruction sets of this build that this processor can run, lowest first; empty without the extension."""
    return list(_extension.isas()) if _extension else []


def built_isas() -> list[str]:
    """Instruction sets of this build, whether or not this processor can run them."""
    return list(_extension.built_isas()) if _extension else []


def isa() -> str | None:
    """The instruction set in use."""
    return str(_extension.isa()) if _extension else None


def set_isa(name: str) -> None:
    """Test hook: use the kernels of one instruction set from isas()."""
    extension().set_isa(name)


_inherited: int | None = None


def _forked() -> None:
    global _inherited
    _inherited = torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def threads() -> int:
    """How many threads a kernel may take, which it is always told: OpenMP's own setting is one of each Python thread.

    A forked child has none of its parent's threads, and OpenMP would wait for them for ever: its first call sets torch
    to one thread, as a worker of a DataLoader does, unless the child has set torch to another number before.
    """
    global _inherited
    if _inherited is not None:
        if _inherited == torch.get_num_threads():
            torch.set_num_threads(1)
        _inherited = None
    return torch.get_num_threads()


def address(name: str, tensor: torch.Tensor | None, *dtypes: torch.dtype, contiguous: bool = True) -> int:
    """Address of a tensor's first element, or 0 for None.

    Raises:
        TypeError: not a real strided CPU tensor (a fake one, a wrapper, another layout), or not of these dtypes.
        ValueError: not contiguous although it must be.
    """
    if tensor is None:
        return 0
    kind = type(tensor)
    if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(f"{name} is a {kind.__name__}, which has no memory of its own; a real tensor is needed")
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_neg():
        raise TypeError(f"{name} must be a plain strided CPU tensor, got {tensor.layout} on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    return tensor.data_ptr()


def float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter as the kernels read it: float32, contiguous. No copy where it is that already."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def matrix(name: str, tensor: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, int, int]:
    """(..., N) as rows of N: the tensor to keep while its memory is read, its address, the distance between rows.

    A copy only where the last dimension is not contiguous or the rows are not equally far apart. Raises as address().
    """
    if tensor is None:
        return None, 0, 0
    if tensor.is_contiguous():  # no view is made of the usual case: it would cost more than the checks
        return tensor, address(name, tensor, dtype), tensor.shape[-1]
    flat = rows(tensor)
    return flat, address(name, flat, dtype, contiguous=False), flat.stride(0)


def vector(name: str, tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A parameter or a table as float32, contiguous: the tensor to keep while its memory is read, and its address."""
    if tensor is None:
        return None, 0
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        tensor = float32(tensor)
    return tensor, address(name, tensor, torch.float32)


def _allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:  # replaced by the tests
    # Sizes one by one: torch takes twice as long to read them from a tuple. The CPU whatever the default device is.
    return torch.empty(*shape, dtype=dtype, device="cpu") if shape else torch.empty((), dtype=dtype, device="cpu")


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Every output of a kernel comes from here, so that the tests can put canaries around it; scratch: workspace()."""
    return _allocate(shape if isinstance(shape, tuple) else tuple(shape), dtype)


def workspace(count: int, dtype: torch.dtype = torch.float32) -> Loan:
    """`with workspace(n) as scratch:` lends so many elements for a call, which must not hand them on."""
    return Loan(count, dtype, _allocate)


def workspace_bytes() -> int:
    """What all threads keep for the scratch of their next calls."""
    return _workspace.held()


def release_workspace() -> None:
    """Gives back the memory that the CPU kernels keep for the scratch of their next calls.

    They keep at most a tenth of the most memory the process ever had, each Python thread its own, until the thread
    ends. Needed only where that memory is wanted for something else.
    """
    _workspace.release()


def output(tensor: torch.Tensor) -> int:
    """Address of what empty() or workspace() gave: dtype and strides are known, a tensor mode may have faked it."""
    if type(tensor) is not torch.Tensor:
        raise TypeError(f"a kernel needs real memory to write to, a tensor mode gave {type(tensor).__name__}")
    return tensor.data_ptr()


_NOTHING = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in DTYPES}


def nothing(dtype: torch.dtype) -> torch.Tensor:
    """Stands for an output that was not asked for; always the same tensor, because making one costs a microsecond."""
    return _NOTHING[dtype]
