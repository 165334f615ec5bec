"""Where the Triton backend runs, and why not elsewhere. Imports no triton, so that every op's table can ask."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: kernels run in Python on CPU tensors. Slow; for tests and for debugging."""
DEVICES = frozenset({"cuda", "cpu"}) if INTERPRETED else frozenset({"cuda"})
OLDEST = (8, 0)
"""Compute capability from which bfloat16 products and asynchronous copies are there."""


def missing() -> str | None:
    """Why the Triton kernels cannot be used on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastlm[triton]')"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"triton is {triton.__version__}, the kernels need 3.6 or newer"
    if torch.version.hip is None:
        capability = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if capability < OLDEST:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {OLDEST[0]}.{OLDEST[1]}"
    return None


# What torch.compiler.assume_constant_result does, which would import dynamo with the package: a traced call asks once.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
