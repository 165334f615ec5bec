"""forward() and backward() of transformer_block: the kernels of its parts and torch's matrix products, in one call.

Layer by layer a block is ten autograd nodes forward and back, 60 us a node with what torch does around it; written out
it is twenty calls and no node. Activations are kept as the products read them, so under autocast in 16 bits, and the
gradients of q, k and v are written side by side, where the product that follows reads them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.native import attention, dropout, empty, gelu, glu, layer_norm, linear, rms_norm, rope

GLU = {"swiglu": "silu", "geglu": "gelu"}


def _norm(
    kind: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    seed: Tensor | None, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, mean, rstd), h being x without a residual."""
    if kind == "layer":
        y, h, mean, rstd = layer_norm.forward(x, residual, weight, bias, eps, seed, p)
    else:
        y, h, rstd = rms_norm.forward(x, residual, weight, eps, 0.0, seed, p)
        mean = empty((0,), torch.float32)
    return y, x if residual is None else h, mean, rstd


def _norm_backward(
    kind: str, dy: Tensor, x: Tensor, weight: Tensor, bias: bool, mean: Tensor, rstd: Tensor, dh: Tensor,
    seed: Tensor | None, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias), dresidual being dx where nothing was dropped."""
    if kind == "layer":
        dx, dr, dweight, dbias = layer_norm.backward(dy, x, weight, mean, rstd, dh, bias, seed, p)
    else:
        dx, dr, dweight = rms_norm.backward(dy, x, weight, rstd, dh, 0.0, seed, p)
        dbias = empty((0,), torch.float32)
    return dx, dx if seed is None else dr, dweight, dbias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) -> (M, N)."""
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _linear_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: bool, wide: bool
) -> list[Tensor]:
    """dweight and dbias, in float32 where wide, else of the weight's dtype; empty where not there or not wanted."""
    if frozen:
        return [empty((0,), weight.dtype), empty((0,), weight.dtype)]
    _, dweight, dbias = linear.backward(dy, x, weight, wide, False, True, bias is not None)
    if bias is None:
        dbias = empty((0,), weight.dtype)
    return [dweight, dbias if wide else dbias.to(weight.dtype)]


def _heads(qkv: Tensor, B: int, S: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, heads, S, D) of the three parts of (B * S, (heads + 2 kv_heads) * D)."""
    total = heads + 2 * kv_heads
    every = qkv.view(B, S, total, qkv.shape[1] // total).transpose(1, 2)
    return every[:, :heads], every[:, heads : heads + kv_heads], every[:, heads + kv_heads :]


def forward(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    seeds: Tensor | None,
    heads: int,
    kv_heads: int,
    causal: bool,
    activation: str,
    norm: str,
    eps: float,
    attention_dropout: float,
    branch_dropout: float,
) -> tuple[Tensor, ...]:
    B, S, C = x.shape
    low, same = qkv_weight.dtype, qkv_weight.dtype is x.dtype
    seed_attention, seed_out, seed_down = _seeds(seeds, attention_dropout, branch_dropout)
    flat = x.contiguous().view(B * S, C)
    y1, _, mean1, rstd1 = _norm(norm, flat, None, norm1_weight, norm1_bias, eps, None, 0.0)
    y1 = y1 if same else y1.to(low)
    qkv = _linear(y1, qkv_weight, qkv_bias)
    q, k, v = _heads(qkv, B, S, heads, kv_heads)
    if cos is not None and sin is not None:
        rope.rotate(q, k, cos, sin, False, False, in_place=True)
    attended, lse = attention.forward(
        q, k, v, None, seed_attention, *(None,) * 6, S, S, int(causal), -1, -1, 0.0, 1.0 / math.sqrt(q.shape[-1]),
        attention_dropout,
    )  # fmt: skip
    attended = attended.transpose(1, 2).reshape(B * S, -1)  # as it lies
    branch = _linear(attended, out_weight, out_bias)
    if same:
        y2, h, mean2, rstd2 = _norm(norm, branch, flat, norm2_weight, norm2_bias, eps, seed_out, branch_dropout)
    else:
        h = dropout.forward(branch, flat, seed_out, branch_dropout)
        y2, _, mean2, rstd2 = _norm(norm, h, None, norm2_weight, norm2_bias, eps, None, 0.0)
        y2 = y2.to(low)
    u = _linear(y2, up_weight, up_bias)
    g = glu.forward(u, None, GLU[activation]) if activation in GLU else gelu.forward(u, activation == "gelu_tanh")
    branch = _linear(g, down_weight, down_bias)
    out = dropout.forward(branch, h, seed_down, branch_dropout)
    return out.view(B, S, C), y1, mean1, rstd1, qkv, attended, lse, h, y2, mean2, rstd2, u, g


def backward(
    dout: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    seeds: Tensor | None,
    y1: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    h: Tensor,
    y2: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    u: Tensor,
    g: Tensor,
    heads: int,
    kv_heads: int,
    causal: bool,
    activation: str,
    norm: str,
    eps: float,
    attention_dropout: float,
    branch_dropout: float,
    frozen: bool,
) -> tuple[Tensor, ...]:
    B, S, C = x.shape
    low, same = qkv_weight.dtype, qkv_weight.dtype is x.dtype
    seed_attention, seed_out, seed_down = _seeds(seeds, attention_dropout, branch_dropout)
    dout = dout.contiguous().view(B * S, C)
    dbranch = dout if same and seed_down is None else dropout.backward(dout, low, seed_down, branch_dropout)
    of_down = _linear_gradients(dbranch, g, down_weight, down_bias, frozen, not same)
    dg = torch.mm(dbranch, down_weight)
    if activation in GLU:
        du, _ = glu.backward(dg, u, None, GLU[activation])
    else:
        du = gelu.backward(dg, u, activation == "gelu_tanh")
    del dg
    of_up = _linear_gradients(du, y2, up_weight, up_bias, frozen, not same)
    dy2 = torch.mm(du, up_weight)
    del du
    seed = seed_out if same else None
    dbranch, dh, *of_norm2 = _norm_backward(
        norm, dy2 if same else dy2.to(x.dtype), h, norm2_weight, norm2_bias is not None, mean2, rstd2, dout, seed,
        branch_dropout,
    )  # fmt: skip
    if not same:
        dbranch = dropout.backward(dh, low, seed_out, branch_dropout)
    of_out = _linear_gradients(dbranch, attended, out_weight, out_bias, frozen, not same)
    dattended = torch.mm(dbranch, out_weight)
    del dbranch, dy2
    q, k, v = _heads(qkv, B, S, heads, kv_heads)
    dqkv = torch.empty_like(qkv)
    into = _heads(dqkv, B, S, heads, kv_heads)
    D = q.shape[-1]
    attention.backward(
        dattended.view(B, S, heads, D).transpose(1, 2), None, q, k, v, None, seed_attention, *(None,) * 6,
        attended.view(B, S, heads, D).transpose(1, 2), lse, S, S, int(causal), -1, -1, 0.0, 1.0 / math.sqrt(D),
        attention_dropout, False, into=into,
    )  # fmt: skip
    if cos is not None and sin is not None:
        rope.rotate(into[0], into[1], cos, sin, False, True, in_place=True)
    of_qkv = _linear_gradients(dqkv, y1, qkv_weight, qkv_bias, frozen, not same)
    dy1 = torch.mm(dqkv, qkv_weight)
    dx, _, *of_norm1 = _norm_backward(
        norm, dy1 if same else dy1.to(x.dtype), x.contiguous().view(B * S, C), norm1_weight, norm1_bias is not None,
        mean1, rstd1, dh, None, 0.0,
    )  # fmt: skip
    return dx.view(B, S, C), *of_norm1, *of_qkv, *of_out, *of_norm2, *of_up, *of_down


def _seeds(
    seeds: Tensor | None, attention_dropout: float, branch_dropout: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the attention weights, of its projection and of the MLP, where something is dropped."""
    if seeds is None:
        return None, None, None
    first, second, third = seeds.split(1)
    return (first if attention_dropout else None), *((second, third) if branch_dropout else (None, None))
