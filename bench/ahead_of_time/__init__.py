"""Cases of the ahead-of-time gate: one file per op with a function cases(). __main__.py says what becomes of them.

    def cases() -> Iterator[Case]:
        for name, dtype in DTYPES.items():
            x = meta(16384, 4096, dtype=dtype)
            yield Case(name, lambda x=x: layer_norm.forward(x, ...), narrow={"_forward": 2})  # stores mean and rstd

The names of cases and kernels are the keys of bench/results/ahead_of_time.json. After a change of either, or of a
kernel, run `python -m bench.ahead_of_time <op> --save` and look at the diff. Keep the cases few: a kernel costs 1 to
10 s of compilation a chip, and `make test` compiles all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Calls of an op's Triton wrappers on meta tensors of real sizes, and what their kernels must fulfil.

    Always demanded: shared memory and registers that the chip has.
    """

    name: str
    """What distinguishes it among the op's cases: direction, dtype, size."""
    run: Callable[[], object]
    """Its launches are compiled."""
    narrow: int | Mapping[str, int | None] | None = 0
    """How many loads and stores of global memory narrower than 16 bytes (statistics, labels) a kernel may have beside
    at least one of 16 bytes; a mapping names the kernels that may have some. None: the layout allows no wide ones."""
    spills: Mapping[str, int] = field(default_factory=dict)
    """Spilling instructions that a kernel may have, by its name; none unless named."""
    wgmma: frozenset[str] = frozenset()
    """Kernels that must use Hopper's matrix instruction on sm_90."""

    def narrow_of(self, kernel: str) -> int | None:
        return self.narrow.get(kernel, 0) if isinstance(self.narrow, Mapping) else self.narrow


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
