"""What is measured, the most important first: time that runs out drops from the end."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.__main__ import SUITES
from bench.harness import Case, Run, backward_only, forward_backward, forward_only
from bench.peers import peers
from fastlm import cuda, ops, use_backend
from fastlm._dispatch import Op
from fastlm.cuda import attention as cuda_attention
from fastlm.kernels import _platform


@dataclass(frozen=True)
class Item:
    case: Case
    compiled: bool
    """Whether torch.compile is among the peers: it takes long, so for the first size of an op only."""

    @property
    def name(self) -> str:
        return self.case.name


GPT2 = [(50257, 768), (1024, 768), *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,),
        (3072, 768), (3072,), (768, 3072), (768,)] * 12, (768,), (768,)]  # fmt: skip

ROWS = [(16384, 4096), (32768, 1024), (131072, 256), (8192, 16384), (4096, 768)]
Sizes = Sequence[tuple[int, ...]] | Mapping[str, Sequence[tuple[int, ...]]]

SIZES: dict[str, Sizes] = {
    "adam": {"1.2B in 100": [(12_400_000,)] * 100, "GPT-2 124M": GPT2},
    "cross_entropy": [(8192, 128256), (8192, 32768), (16384, 50257), (4096, 8192)],
    "embedding": [(65536, 50304, 768), (16384, 128256, 4096)],
    "gelu": [(16384, 4096), (4096, 768)],
    "glu": [(8192, 11008), (4096, 768)],
    "kl_div": [(8192, 32768), (8192, 128256)],
    "layer_norm": ROWS,
    "linear_cross_entropy": [(8192, 4096, 128256), (16384, 768, 50304)],
    "rms_norm": ROWS,
    "rope": [(4, 4096, 32, 128), (8, 1024, 12, 64)],
    "softmax": [(16384, 4096), (8192, 32768), (4096, 256)],
}
"""Sizes on a GPU, several times its L2 cache but for the last, which shows the cost of a start. A suite that is not
named here runs its own sizes."""

SMALL: dict[str, Sizes] = {
    "adam": {"odd": [(1,), (17,), (1031, 3), (0,)]},
    "cross_entropy": [(5, 1031), (3, 65), (3, 65544)],
    "embedding": [(33, 67, 129), (33, 67, 136)],
    "gelu": [(17, 1025), (1, 3), (17, 1032)],
    "glu": [(17, 1025), (1, 3), (17, 1032)],
    "kl_div": [(5, 1031), (3, 65), (3, 65544)],
    "layer_norm": [(17, 1025), (1, 3), (33, 129), (17, 1032), (3, 8200)],
    "linear_cross_entropy": [(33, 67, 131)],
    "rms_norm": [(17, 1025), (1, 3), (33, 129), (17, 1032), (3, 8200)],
    "rope": [(2, 33, 3, 32)],
    "softmax": [(17, 1025), (1, 3), (17, 1032), (3, 65544)],
}
"""Sizes that fill no block, of rows that 16 bytes divide and do not, short and split over several blocks: for
compute-sanitizer, and for the dry run."""


def ours() -> list[str]:
    """The backends that run here on a GPU. Each op is timed on all it has: on the one that is chosen as "fastlm"."""
    return [name for name, why in (("triton", _platform.missing()), ("cuda", cuda.missing())) if why is None]


def forced(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and what it returns where that is to be called, on this backend."""

    def run(*inputs: Any) -> Any:
        with use_backend(backend):
            result = function(*inputs)
        return forced(backend, result) if callable(result) else result

    return run


def each_of_ours(op: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {name: forced(name, function) for name in ours() if name in Op.registry[op].rows}


def suite_cases(suite: str, sizes: Sizes | None) -> Iterator[Case]:
    cases = importlib.import_module(f"bench.bench_{suite}").cases
    return cases(sizes) if sizes is not None else cases()


def op_items(small: bool = False) -> list[Item]:
    """Every suite but attention, first sizes first, bfloat16 before float32, forward and backward before forward."""
    table = SMALL if small else SIZES
    ranked = []
    for suite in SUITES:
        if suite == "attention":
            continue
        order: dict[tuple[str, torch.dtype], int] = {}
        for case in suite_cases(suite, table.get(suite)):
            size = order[case.op, case.dtype] = order.get((case.op, case.dtype), -1) + 1
            case.functions.update(peers(case.op) | each_of_ours(suite, case.functions["fastlm"]))
            wide = case.dtype is torch.float32
            compiled = size == 0 and not wide and not small
            ranked.append(((2 * size + 3 * wide, 0), Item(case, compiled)))
            if case.forward:
                ranked.append(((2 * size + 3 * wide, 1), Item(case.forward_alone(), compiled)))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


# --- attention -------------------------------------------------------------------------------------------------------

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
DIRECTIONS: dict[Any, tuple[str, float, float]] = {
    forward_only: ("forward", 4, 4),
    backward_only: ("backward", 10, 8),
    forward_backward: ("both", 14, 11),
}
"""With operations for each query, key and channel, as the papers count, and tensors that cross the bus."""


class OfAmpere:
    """A function that calls attention, for the kernels of sm_80 where there are others: only along_paths() heeds it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.call = function

    def __call__(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def along_paths(runner: Callable[..., Run]) -> Callable[..., Run]:
    """The runner, whose backward pass too takes the kernels that its function is for."""

    def build(function: Callable[..., Any], inputs: Sequence[Any]) -> Run:
        if not isinstance(function, OfAmpere):
            return runner(function, inputs)
        ampere = mock.patch.object(cuda_attention, "HOPPER", False)
        with ampere:
            run = runner(function, inputs)

        def timed() -> Any:
            with ampere:
                return run()

        return timed

    return build


def of_ampere(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    there = "cuda" in ours() and torch.cuda.get_device_capability() == (9, 0)
    return {"cuda sm_80": OfAmpere(forced("cuda", function))} if there else {}


def sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attention_case(
    b: int, h: int, s: int, d: int, causal: bool, runner: Callable[..., Any], dtype: torch.dtype
) -> Case:
    size, pairs = b * h * s * d * dtype.itemsize, b * h * s * s / (2 if causal else 1)
    direction, operations, tensors = DIRECTIONS[runner]
    fused = partial(ops.attention, causal=causal)
    functions: dict[str, Callable[..., Any]] = {"fastlm": fused} | each_of_ours("attention", fused)
    functions |= of_ampere(fused)
    functions |= {name: partial(sdpa, backend, causal) for name, backend in BACKENDS.items()}
    return Case(
        f"attention {direction}{' causal' if causal else ''}",
        f"B{b} H{h} S{s} D{d}",
        dtype,
        lambda: [torch.randn(b, s, h, d).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)],
        functions | peers(f"attention{' causal' if causal else ''}"),
        bytes=tensors * size,
        flops=operations * pairs * d,
        runner=along_paths(runner),
    )


def attention_items(small: bool = False) -> list[Item]:
    """16 Ki tokens of 2048 channels, as the papers measure: each direction alone first, and long sequences, D=128."""
    lengths = (65,) if small else (16384, 4096, 8192, 2048, 1024, 512)
    tokens, channels = (130, 256) if small else (16384, 2048)
    found = []
    for directions in ((forward_only, backward_only), (forward_backward,)):
        for s, d, causal, runner in product(lengths, (128, 64, 256), (False, True), directions):
            found.append(Item(attention_case(tokens // s, channels // d, s, d, causal, runner, torch.bfloat16), False))
    return found


# --- training --------------------------------------------------------------------------------------------------------


def train_items(small: bool = False) -> list[Item]:
    """One step of a GPT: forward, loss, backward, clipping, AdamW."""
    from bench.bench_train import contender

    gpt2 = {"style": "gpt2", "vocab": 50304, "context": 1024, "layers": 12, "heads": 12, "width": 768}
    llama = {"style": "llama", "vocab": 32000, "context": 2048, "layers": 16, "heads": 16, "width": 2048}
    models, contenders = [("124M", gpt2, 16), ("1.1B", llama, 4)], ["fastlm", "plain", "plain compiled"]
    if small:
        contenders.pop()
        models = [("tiny", {"style": "gpt2", "vocab": 67, "context": 16, "layers": 1, "heads": 2, "width": 32}, 2)]
    found = []
    for name, model, batch in models:
        functions = {c: partial(contender, c, model, "bf16") for c in contenders}
        found.append(
            Item(
                Case(
                    f"train {model['style']} {name}",
                    f"{batch}x{model['context']}",
                    torch.bfloat16,
                    lambda batch=batch, model=model: [torch.randint(model["vocab"], (batch, model["context"] + 1))],
                    functions,
                    flops=step_flops(model, batch),
                    runner=lambda build, inputs: partial(build(), *inputs),
                ),
                False,
            )
        )
    return found


def step_flops(model: dict[str, Any], batch: int) -> float:
    """Of the products of one step: 6 for each weight and token, and attention's, causal."""
    width, layers, context = model["width"], model["layers"], model["context"]
    weights = 12 * layers * width * width + model["vocab"] * width
    return batch * context * (6.0 * weights + 6.0 * layers * width * context)
