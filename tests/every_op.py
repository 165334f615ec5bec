"""One call of every op with CPU kernels, large enough to be shared out between threads: what tests of processes run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import ops, optim


@functools.cache
def given(*shape: int) -> Tensor:
    """Random numbers, the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Call = Callable[[], list[Tensor]]


def gradients(function: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype) -> Call:
    """Outputs and gradients for random inputs, which are made now: a forked child cannot, where torch uses threads."""
    leaves = [given(*shape).to(dtype).requires_grad_() for shape in shapes]
    upstream: list[Tensor] = []

    def call() -> list[Tensor]:
        result = function(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if not upstream:
            upstream.extend(given(*o.shape).to(o.dtype) if o.dim() else torch.ones_like(o) for o in outputs)
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    return call


def step() -> list[Tensor]:
    params = [torch.nn.Parameter(given(n).clone()) for n in (300_000, 7)]
    for p in params:
        p.grad = given(p.numel()).clone()
    optim.AdamW(params, max_norm=1.0).step()
    return [p.detach() for p in params]


LABELS = torch.arange(257) % 211


@functools.cache
def calls() -> dict[str, Call]:
    found: dict[str, Call] = {}
    angles = given(129, 32)
    cos, sin = angles.cos(), angles.sin()
    for dtype in (torch.float32, torch.bfloat16):
        of = functools.partial(gradients, dtype=dtype)
        heads, matrix = (2, 3, 129, 64), (513, 320)
        several = {
            "attention": of(lambda *t: ops.attention(*t, causal=True), heads, heads, heads),
            "cross_entropy": of(lambda x: ops.cross_entropy(x, LABELS), (257, 211)),
            "linear_cross_entropy": of(lambda x, w: ops.linear_cross_entropy(x, w, LABELS), (257, 64), (211, 64)),
            "linear": of(ops.linear, (257, 64), (211, 64), (211,)),
            "layer_norm": of(ops.layer_norm, matrix, (320,), (320,)),
            "add_rms_norm": of(ops.add_rms_norm, matrix, matrix, (320,)),
            "gelu": of(ops.gelu, matrix),
            "swiglu": of(ops.swiglu, matrix),
            "rope": of(lambda q, k: tuple(ops.rope(q, k, cos, sin)), heads, heads),
        }
        found |= {f"{name} {dtype}": call for name, call in several.items()}
    return found | {"adam": step}


def run() -> dict[str, list[Tensor]]:
    return {name: call() for name, call in calls().items()}


def different(first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> list[str]:
    """Names of the ops whose results differ in a bit."""
    return [n for n in first if not all(torch.equal(a, b) for a, b in zip(first[n], second[n], strict=True))]
