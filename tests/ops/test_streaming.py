"""Outputs too large for the cache are streamed past it: the same values as from a call on a few rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastlm import ops
from tests.ops.harness import BACKENDS, differentiate, on


def rope(x: torch.Tensor) -> torch.Tensor:
    """Every row of x a batch of its own: 17 heads of one position."""
    angle = torch.arange(32.0)[None]
    return ops.rope(x.view(-1, 17, 1, 64), None, angle.cos(), angle.sin()).flatten(1)


CALLS = {
    "layer_norm": (lambda x: ops.layer_norm(x, torch.ones(x.shape[-1])), 1088),
    "rms_norm": (lambda x: ops.rms_norm(x, torch.ones(x.shape[-1])), 1088),
    "swiglu": (ops.swiglu, 2176),
    "gelu": (ops.gelu, 1081),  # odd rows: only the share as a whole is aligned
    "rope": (rope, 1088),
}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("function", "n"), CALLS.values(), ids=CALLS)
def test_large_outputs(backend: str, dtype: torch.dtype, function: Callable[..., torch.Tensor], n: int) -> None:
    m = (17 << 20) // (1081 * dtype.itemsize)
    x = torch.randn(m, n).to(dtype)
    grad = torch.randn(function(x[:1]).shape[-1]).to(dtype).expand(m, -1).contiguous()
    with on(backend):
        outputs, grads = differentiate(function, [x], [grad])
        for part in (slice(0, 7), slice(m // 2 - 3, m // 2 + 3), slice(m - 5, m)):
            few, few_grads = differentiate(function, [x[part]], [grad[part]])
            for all_rows, few_rows in ((outputs[0], few[0]), (grads[0], few_grads[0])):
                torch.testing.assert_close(all_rows[part], few_rows)
