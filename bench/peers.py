"""Fast packages that an op is timed against where they are installed; none is needed. Signatures as the op's suite has.

Each provider is a function that imports its package when it is asked for, so that a broken one costs its own row only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Function = Callable[..., Any]
PACKAGES = {
    "liger": "liger_kernel",
    "quack": "quack",
    "flash_attn": "flash_attn",
    "flash_attn 3": "flash_attn_interface",
}


def peers(op: str) -> dict[str, Function]:
    """By provider, what is installed for an op (its name in the suite's cases)."""
    found = {}
    for provider, package in PACKAGES.items():
        make = PROVIDERS.get((provider, op))
        if make is not None and importlib.util.find_spec(package):
            found[provider] = _at_first_call(make)
    if op == "linear_cross_entropy" and hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()  # without them it is the reference implementation
        found["torch chunked"] = functools.partial(F.linear_cross_entropy, options=options)
    return found


def _at_first_call(make: Callable[[], Function]) -> Function:
    made = functools.cache(make)
    return lambda *inputs: made()(*inputs)


def _liger(name: str, *after: Any, **options: Any) -> Callable[[], Function]:
    def make() -> Function:
        from liger_kernel.transformers import functional

        function = getattr(functional, name)
        return lambda *inputs: function(*inputs, *after, **options)

    return make


def _liger_glu(name: str) -> Callable[[], Function]:
    """Liger takes the halves apart, and copies what is not contiguous."""

    def make() -> Function:
        from liger_kernel.transformers import functional

        function = getattr(functional, name)
        return lambda x: function(*x.chunk(2, -1))

    return make


def _liger_rope() -> Function:
    from liger_kernel.transformers import functional

    return lambda q, k, _cos, _sin, cos, sin: functional.liger_rope(q, k, cos[None], sin[None])


def _quack(name: str) -> Callable[[], Function]:
    def make() -> Function:
        import quack

        return getattr(quack, name)

    return make


def _flash_attn(package: str, causal: bool) -> Callable[[], Function]:
    """Of FlashAttention-2, or of FlashAttention-3, some releases of which return the logarithms of the sums as well."""

    def make() -> Function:
        function = importlib.import_module(package).flash_attn_func

        def run(*inputs: Any) -> Any:
            out = function(*(t.transpose(1, 2) for t in inputs), causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return make


PROVIDERS: dict[tuple[str, str], Callable[[], Function]] = {
    ("liger", "layer_norm"): _liger("liger_layer_norm", 1e-5),
    ("liger", "rms_norm"): _liger("liger_rms_norm", 1e-6, in_place=False),
    ("liger", "add_rms_norm"): _liger("liger_fused_add_rms_norm", 1e-6, in_place=False),
    ("liger", "cross_entropy"): _liger("liger_cross_entropy"),
    ("liger", "linear_cross_entropy"): _liger("liger_fused_linear_cross_entropy"),
    ("liger", "swiglu"): _liger_glu("liger_swiglu"),
    ("liger", "geglu"): _liger_glu("liger_geglu"),
    ("liger", "rope"): _liger_rope,
    ("liger", "softmax"): _liger("liger_softmax"),
    ("quack", "rms_norm"): _quack("rmsnorm"),
    ("quack", "cross_entropy"): _quack("cross_entropy"),
    ("quack", "softmax"): _quack("softmax"),
    ("flash_attn", "attention"): _flash_attn("flash_attn", False),
    ("flash_attn", "attention causal"): _flash_attn("flash_attn", True),
    ("flash_attn 3", "attention"): _flash_attn("flash_attn_interface", False),
    ("flash_attn 3", "attention causal"): _flash_attn("flash_attn_interface", True),
}
