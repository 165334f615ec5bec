"""A block of a Transformer, forward and backward, against the same layers of torch and those under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, pytest_suite
from bench.plain_gpt import PlainBlock
from fastlm.models import CausalLMConfig
from fastlm.ops.transformer_block import PARAMETERS, transformer_block

SIZES = [(12, 64, 128, 4), (8, 256, 384, 6)]
"""Batch, length, width, heads: of nanoGPT's small models."""


def cases(sizes: Sequence[tuple[int, int, int, int]] = tuple(SIZES)) -> Iterator[Case]:
    for b, s, c, h in sizes:
        config = CausalLMConfig(vocab_size=1, context=s, layers=1, heads=h, width=c)
        for dtype in (torch.float32, torch.bfloat16):
            products = 12 * c * c * b * s  # multiplications and additions of the four products are 2 of these
            yield Case(
                "transformer_block",
                f"B{b} S{s} C{c}",
                dtype,
                lambda b=b, s=s, c=c, config=config, dtype=dtype: _inputs(b, s, c, config, dtype),
                {"fastlm": _ours, "eager": _plain, "compile": _plain},
                bytes=0.0,
                flops=3 * (2 * products + 2 * b * s * s * c),  # attention is causal
                forward=1 / 3,
            )


def _inputs(b: int, s: int, c: int, config: CausalLMConfig, dtype: torch.dtype) -> list[Any]:
    block = PlainBlock(config).to(dtype)
    names = [f"{n}.{k}" for n in ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.up", "mlp.down")
             for k in ("weight", "bias")]  # fmt: skip
    assert len(names) == len(PARAMETERS)
    return [block, torch.randn(b, s, c).to(dtype).requires_grad_(), *map(block.get_parameter, names)]


def _plain(block: PlainBlock, x: Tensor, *parameters: Tensor) -> Tensor:
    return block(x, None)


def _ours(block: PlainBlock, x: Tensor, *parameters: Tensor) -> Tensor:
    return transformer_block(x, parameters, heads=block.heads)


test_transformer_block = pytest_suite(cases)
