"""Wrappers of the CUDA launchers in fastlm._cuda: tensor to pointer, sizes, strides, GPU, stream.

A raw pointer trusts its caller: with a wrong dtype it corrupts memory, from a fake tensor it is null. So `address`
looks before it gives one; `output` is for what `empty` just allocated. The launchers start kernels on the current
stream of the tensor's GPU and return; nothing here waits for the device. The kernels' binaries come from _binaries.py.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm._walk import rows
from fastlm.cuda import _binaries

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
DEVICES = frozenset({"cuda"})
OLDEST = (8, 0)
"""Compute capability from which bfloat16 conversions are there."""

_extension: ModuleType | None
try:
    _extension = importlib.import_module("fastlm._cuda")
    _extension.set_loader(_binaries.load)
except ModuleNotFoundError as error:
    if error.name != "fastlm._cuda":
        raise
    _extension = None  # the build says why in its manifest; any other failure to load it is a fault and raises
_on_gpu = True


def emulate(module: ModuleType) -> None:
    """Test hook: launch through this module, which runs the kernels on CPU tensors (csrc/cuda/emulation)."""
    global _extension, _on_gpu
    _extension, _on_gpu = module, False


def missing() -> str | None:
    """Why the CUDA kernels cannot be used on this machine, or None."""
    if _extension is None:
        reason = _binaries.manifest().get("launchers", "fastlm was not installed from here")
        if reason == "built":
            reason = f"it was built for another than {platform.python_version()}"
        return f"fastlm._cuda is not built for this Python: {reason}"
    if not _on_gpu:
        return None
    if torch.version.hip is not None:
        return "PyTorch is built for AMD GPUs"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    oldest = min(capabilities)
    if oldest < OLDEST:
        return f"the GPU has compute capability {oldest[0]}.{oldest[1]}, below {OLDEST[0]}.{OLDEST[1]}"
    return _binaries.missing(10 * major + minor for major, minor in capabilities)


# What torch.compiler.assume_constant_result does, which would import dynamo with the package: a traced call asks once.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def built() -> bool:
    """Whether the launchers are there; whether a GPU is, is another question."""
    return _extension is not None


def extension() -> Any:
    """The launchers, fastlm._cuda."""
    if _extension is None:
        raise ImportError(missing())
    return _extension


def lane(tensor: Tensor) -> tuple[int, int]:
    """The last two arguments of every launcher: the GPU the tensor lies on, and its current stream."""
    if not _on_gpu:
        return 0, 0
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


_REAL = frozenset({Tensor, torch.nn.Parameter})


def address(name: str, tensor: Tensor | None, *dtypes: torch.dtype, contiguous: bool = True) -> int:
    """Address of a tensor's first element, or 0 for None.

    Raises:
        TypeError: not a real strided CUDA tensor (a fake one, a wrapper, another layout), or not of these dtypes.
        ValueError: not contiguous although it must be.
    """
    if tensor is None:
        return 0
    if (
        type(tensor) not in _REAL or tensor.is_cuda is not _on_gpu or tensor.dtype not in dtypes or tensor.is_neg()
        or not (tensor.is_contiguous() if contiguous else tensor.layout is torch.strided)
    ):  # fmt: skip
        _look_closer(name, tensor, dtypes, contiguous)
    return tensor.data_ptr()


def _look_closer(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], contiguous: bool) -> None:
    """Raises what is wrong with the tensor; returns where it is a subclass with memory of its own."""
    kind = type(tensor)
    if kind not in _REAL and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(f"{name} is a {kind.__name__}, which has no memory of its own; a real tensor is needed")
    if tensor.is_cuda is not _on_gpu or tensor.layout is not torch.strided or tensor.is_neg():
        raise TypeError(f"{name} must be a plain strided CUDA tensor, got {tensor.layout} on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)}, strides {tensor.stride()}")


def matrix(name: str, tensor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int, int]:
    """(..., N) as rows of N: the tensor to keep while its memory is read, its address, the distance between rows.

    A copy only where the last dimension is not contiguous or the rows are not equally far apart. Raises as address().
    """
    if tensor is None:
        return None, 0, 0
    if tensor.is_contiguous():  # no view is made of the usual case: it would cost more than the checks
        if type(tensor) in _REAL and tensor.is_cuda is _on_gpu and tensor.dtype is dtype and not tensor.is_neg():
            return tensor, tensor.data_ptr(), tensor.shape[-1]  # all that address() looks at, in half its time
        return tensor, address(name, tensor, dtype), tensor.shape[-1]
    flat = rows(tensor)
    return flat, address(name, flat, dtype, contiguous=False), flat.stride(0)


def vector(name: str, tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A parameter of a layer: the tensor to keep while its memory is read, its address, the value of its dtype.

    The kernels read every dtype of DTYPES as it is; a copy only of another dtype (as float32) or of a strided one.
    """
    if tensor is None:
        return None, 0, 0
    value = DTYPES.get(tensor.dtype)
    if (
        value is not None and tensor.is_contiguous() and type(tensor) in _REAL and tensor.is_cuda is _on_gpu
        and not tensor.is_neg()
    ):  # fmt: skip
        return tensor, tensor.data_ptr(), value
    if value is None or not tensor.is_contiguous():
        tensor = (tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)).contiguous()
    return tensor, address(name, tensor, *DTYPES), DTYPES[tensor.dtype]


def _allocate(
    shape: Sequence[int], dtype: torch.dtype, like: Tensor, strides: Sequence[int] | None = None
) -> Tensor:  # replaced by the tests
    if strides is not None:
        return like.new_empty_strided(shape, strides, dtype=dtype)
    # Sizes one by one, which torch reads in half the time of a tuple, and no device, which it would have to parse.
    return like.new_empty(*shape, dtype=dtype) if shape else like.new_empty((), dtype=dtype)


def empty(
    shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None, strides: Sequence[int] | None = None
) -> Tensor:
    """Every output and scratch of a kernel comes from here, so that the tests can put canaries around it.

    Contiguous, or with these strides, which must leave no gaps.
    """
    return _allocate(shape, dtype or like.dtype, like, strides)


def output(tensor: Tensor) -> int:
    """Address of what empty() returned: dtype and strides are known, a tensor mode may still have faked it."""
    if type(tensor) is not Tensor:
        raise TypeError(f"a kernel needs real memory to write to, a tensor mode gave {type(tensor).__name__}")
    return tensor.data_ptr()


_NOTHING: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stands for an output that was not asked for; always the same tensor, because making one costs microseconds."""
    key = (dtype or like.dtype, like.device)
    found = _NOTHING.get(key)
    if found is None:
        with torch.inference_mode(False):  # whatever the first caller is in
            found = _NOTHING[key] = torch.empty(0, dtype=key[0], device=key[1])
    return found
