"""The feed-forward half of a Transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: ops.gelu(x),
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "swiglu": lambda x: ops.swiglu(x),
    "geglu": lambda x: ops.geglu(x),
}
GATED = frozenset({"swiglu", "geglu"})


def default_hidden(width: int, activation: str) -> int:
    """4 * width; for gated activations 8/3 * width rounded up to a multiple of 64: the same number of weights."""
    return -(-8 * width // 192) * 64 if activation in GATED else 4 * width


class MLP(torch.nn.Module):
    """down(activation(up(x))); for swiglu and geglu, `up` holds [gate | up] and the activation multiplies them.

    GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415). SwiGLU, GEGLU: Shazeer 2020 (arXiv:2002.05202).

    Args:
        width: of input and output.
        hidden: width in between; None stands for default_hidden(width, activation).
        activation: "gelu", "gelu_tanh", "relu", "silu", "swiglu" or "geglu".
        bias: whether both products have one.

    Raises:
        ValueError: an unknown activation, a width below 1.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = default_hidden(width, activation) if hidden is None else hidden
        if width < 1 or hidden < 1:
            raise ValueError(f"width and hidden must be at least 1, got {width} and {hidden}")
        self.activation = activation
        packed = 2 * hidden if activation in GATED else hidden
        self.up = torch.nn.Linear(width, packed, bias, device, dtype)
        self.down = torch.nn.Linear(hidden, width, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
