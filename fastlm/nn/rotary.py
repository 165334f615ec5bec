"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Angle of position p and pair i: p * base^(-2 i / R), R = fraction * D being the rotated width. Pairs are
    (i, i + R/2), as in GPT-NeoX and Llama. The table is float32 whatever the model's dtype, computed in float64, grows
    when a longer sequence comes, and is not in the state dict.

    Args:
        head_width: D, width of one head.
        base: the longest wavelength is 2 pi base positions.
        fraction: share of the head that is rotated, its first part; fraction * head_width must be even.

    Raises:
        ValueError: base not positive, fraction not in (0, 1], rotated width not a positive even number.
    """

    def __init__(self, head_width: int, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        self.rotated = int(head_width * fraction)
        if self.rotated < 2 or self.rotated % 2:
            raise ValueError(
                f"fraction * head_width must be a positive even number, got {fraction} * {head_width} = {self.rotated}"
            )
        self.head_width, self.base, self.fraction = head_width, base, fraction
        # Plain attributes, not buffers: model.bfloat16() must not round them.
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, length: int, offset: int = 0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions offset to offset + length - 1, each (length, R/2) float32."""
        device = torch.get_default_device() if device is None else torch.device(device)
        cos, sin = self._cos, self._sin
        if cos is None or sin is None or cos.shape[0] < offset + length or cos.device != device:
            cos, sin = self._table(max(offset + length, 2 * (0 if cos is None else cos.shape[0])), device)
            if not torch.compiler.is_compiling():
                self._cos, self._sin = cos, sin
        return cos[offset : offset + length], sin[offset : offset + length]

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # Outside inference mode, or a table made by generation could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(length, dtype=torch.float64, device=device)
            pairs = torch.arange(0, self.rotated, 2, dtype=torch.float64, device=device)
            angles = torch.outer(positions, self.base ** (-pairs / self.rotated))  # (length, R/2)
            return angles.cos().float(), angles.sin().float()

    def extra_repr(self) -> str:
        return f"{self.head_width}, base={self.base}, fraction={self.fraction}"


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the first 2 * cos.shape[-1] channels of q (B, H, S, D) and k (B, Hk, S, D), leaving the others."""
    rotated = 2 * cos.shape[-1]
    if rotated == q.shape[-1]:
        return ops.rope(q, k, cos, sin)
    q1, k1 = ops.rope(q[..., :rotated], k[..., :rotated], cos, sin)
    return torch.cat((q1, q[..., rotated:]), -1), torch.cat((k1, k[..., rotated:]), -1)
