"""forward() and backward() of transformer_block in plain PyTorch: its parts one after another, differentiated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm.reference import attention, dropout, gelu, glu, layer_norm, rms_norm, rope

GLU = {"swiglu": "silu", "geglu": "gelu"}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.to(weight.dtype) @ weight.t()
    return y if bias is None else y + bias


def _run(
    x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor | None, qkv_weight: Tensor, qkv_bias: Tensor | None,
    out_weight: Tensor, out_bias: Tensor | None, norm2_weight: Tensor, norm2_bias: Tensor | None, up_weight: Tensor,
    up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    seeds: Tensor | None, heads: int, kv_heads: int, causal: bool, activation: str, norm: str, eps: float,
    attention_dropout: float, branch_dropout: float,
) -> Tensor:  # fmt: skip
    def normalise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if norm == "layer":
            return layer_norm.forward(x, None, weight, bias, eps, None, 0.0)[0]
        return rms_norm.forward(x, None, weight, eps, 0.0, None, 0.0)[0]

    def seed(i: int, p: float) -> Tensor | None:
        return seeds[i : i + 1] if seeds is not None and p else None

    B, S, C = x.shape
    qkv = _linear(normalise(x, norm1_weight, norm1_bias), qkv_weight, qkv_bias)
    every = qkv.view(B, S, heads + 2 * kv_heads, C // heads).transpose(1, 2)
    q, k, v = every.split((heads, kv_heads, kv_heads), 1)
    if cos is not None and sin is not None:
        q, k = rope.forward(q, k, cos, sin, False)
    attended, _ = _Attention.apply(
        q, k, v, seed(0, attention_dropout), S, int(causal), 1.0 / math.sqrt(C // heads), attention_dropout
    )
    branch = _linear(attended.transpose(1, 2).reshape(B * S, C), out_weight, out_bias).view(B, S, C)
    h = dropout.forward(branch, x, seed(1, branch_dropout), branch_dropout)
    u = _linear(normalise(h, norm2_weight, norm2_bias), up_weight, up_bias)
    g = glu.forward(u, None, GLU[activation]) if activation in GLU else gelu.forward(u, activation == "gelu_tanh")
    return dropout.forward(_linear(g, down_weight, down_bias), h, seed(2, branch_dropout), branch_dropout)


class _Attention(torch.autograd.Function):
    """attention.forward() writes in place, so its own backward() is called."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, S: int, causal: int, scale: float, p: float
    ) -> Any:
        ctx.options = (S, S, causal, -1, -1, 0.0, scale, p)
        out, lse = attention.forward(q, k, v, None, seed, *(None,) * 6, *ctx.options)
        ctx.save_for_backward(q, k, v, seed, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        q, k, v, seed, out, lse = ctx.saved_tensors
        arguments: Any = (dout, None, q, k, v, None, seed, *(None,) * 6, out, lse, *ctx.options, False)
        with torch.no_grad():
            dq, dk, dv, _, _ = attention.backward(*arguments)
        return dq, dk, dv, *(None,) * 5


def saved_like(
    x: Tensor, qkv_weight: Tensor, up_weight: Tensor, down_weight: Tensor, heads: int, norm: str
) -> list[Tensor]:
    """Empty tensors like y1, mean1, rstd1, qkv, attended, lse, h, y2, mean2, rstd2, u and g, which backends save."""
    (B, S, C), low, F32 = x.shape, qkv_weight.dtype, torch.float32
    M = B * S
    wide, statistics = ((M, C), low), [((M if norm == "layer" else 0,), F32), ((M,), F32)]
    attended = [((M, qkv_weight.shape[0]), low), wide, ((B, heads, S), F32)]
    hidden = [((M, weight), low) for weight in (up_weight.shape[0], down_weight.shape[1])]
    every = [wide, *statistics, *attended, ((M, C), x.dtype), wide, *statistics, *hidden]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in every]


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """What is saved stays empty: backward() computes the block again."""
    x, qkv_weight, up_weight, down_weight, heads, norm = (arguments[i] for i in (0, 3, 9, 11, 16, 20))
    return _run(*arguments), *saved_like(x, qkv_weight, up_weight, down_weight, heads, norm)


def backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, frozen = arguments[:16], arguments[28:-1], arguments[-1]
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else None for t in inputs[:13]]
    with torch.enable_grad():
        out = _run(*leaves, *inputs[13:], *options)  # type: ignore[arg-type]
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, dout))
    gradients = [dout.new_empty(0) if t is None else next(found) for t in leaves]
    wide = inputs[3].dtype is not inputs[0].dtype
    for i in (3, 4, 5, 6, 9, 10, 11, 12):  # of the products: in float32 where x has another dtype than they
        gradients[i] = gradients[i].new_empty(0) if frozen else gradients[i].float() if wide else gradients[i]
    return tuple(gradients)
