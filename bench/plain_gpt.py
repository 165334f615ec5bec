"""The peer of bench_train and of the parity tests: fastlm.models.CausalLM written in plain PyTorch, as nanoGPT does it.

Same config, same names of weights, so that a state dict of one loads into the other. No fastlm code runs in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        D, gated = c.width // c.heads, c.activation in ("swiglu", "geglu")
        self.heads, self.kv_heads, self.activation, self.p = c.heads, c.kv_heads or c.heads, c.activation, c.dropout
        hidden = c.mlp_width or (-(-8 * c.width // 192) * 64 if gated else 4 * c.width)
        self.norm1, self.norm2 = plain_norm(c), plain_norm(c)
        self.attention = nn.ModuleDict(
            {
                "qkv": nn.Linear(c.width, (c.heads + 2 * self.kv_heads) * D, bias=c.bias),
                "out": nn.Linear(c.width, c.width, bias=c.bias),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(c.width, hidden * (1 + gated), bias=c.bias),
                "down": nn.Linear(hidden, c.width, bias=c.bias),
            }
        )

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, S, C = x.shape
        D = C // self.heads
        q, k, v = self.attention["qkv"](x).split((C, self.kv_heads * D, self.kv_heads * D), dim=2)
        q, k, v = (t.view(B, S, -1, D).transpose(1, 2) for t in (q, k, v))
        if rope is not None:
            q, k = plain_rope(q, *rope), plain_rope(k, *rope)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=True)
        return self.attention["out"](y.transpose(1, 2).contiguous().view(B, S, C))

    def feed(self, x: Tensor) -> Tensor:
        x = self.mlp["up"](x)
        if self.activation in ("swiglu", "geglu"):
            gate, up = x.chunk(2, -1)
            return self.mlp["down"]((F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * up)
        return self.mlp["down"](F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + F.dropout(self.attend(self.norm1(x), rope), self.p, self.training)
        return x + F.dropout(self.feed(self.norm2(x)), self.p, self.training)


def plain_norm(c) -> nn.Module:
    return nn.LayerNorm(c.width, c.norm_eps, bias=c.bias) if c.norm == "layer" else nn.RMSNorm(c.width, c.norm_eps)


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainGPT(nn.Module):
    """config: a fastlm.models.CausalLMConfig."""

    def __init__(self, config) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Embedding(c.context, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.layers))
        self.norm = plain_norm(c)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        c, S, rope = self.config, tokens.shape[1], None
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(S, device=tokens.device))
        else:
            D = c.width // c.heads
            pairs = torch.arange(0, D, 2, dtype=torch.float64, device=tokens.device)
            angles = torch.outer(torch.arange(S, device=tokens.device).double(), c.rope_base ** (-pairs / D))
            dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
            rope = angles.cos().float().to(dtype), angles.sin().float().to(dtype)
        x = F.dropout(x, c.dropout, self.training)
        for block in self.blocks:
            x = block(x, rope)
        logits = F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)
        return F.cross_entropy(logits.view(-1, c.vocab_size), targets.reshape(-1), reduction=reduction)
