"""transformer_block: a whole pre-norm block of a Transformer as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import _dispatch, native
from fastlm._dispatch import Backend, Op
from fastlm.ops._check import check_choice, check_device, check_floating
from fastlm.ops._library import cast, define, no_double_backward
from fastlm.ops._random import check_dropout
from fastlm.reference.transformer_block import saved_like

DTYPES = frozenset({torch.float32, torch.bfloat16})
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "geglu")
PARAMETERS = (
    "norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias",
    "norm2_weight", "norm2_bias", "up_weight", "up_bias", "down_weight", "down_bias",
)  # fmt: skip
LINEAR = (2, 3, 4, 5, 8, 9, 10, 11)  # those of the four products

# No rows for GPUs: launches there are queued ahead of the device, and what a node costs the host is hidden.
OP = Op(
    "transformer_block",
    Backend("cpu", "fastlm.native.transformer_block", frozenset({"cpu"}), DTYPES, limits={"head_dim": 256},
            missing=native.missing),
    Backend("reference", "fastlm.reference.transformer_block"),
)  # fmt: skip


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *saved_like(x, rest[2], rest[8], rest[10], rest[15], rest[19])


def _fake_backward(dout: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    frozen, wide = rest[-1], rest[2].dtype is not x.dtype

    def gradient(i: int, p: Tensor | None) -> Tensor:
        if p is None or (frozen and i in LINEAR):
            return x.new_empty((0,))
        return p.new_empty(p.shape, dtype=torch.float32 if wide and i in LINEAR else p.dtype)

    return x.new_empty(x.shape), *(gradient(i, p) for i, p in enumerate(rest[:12]))


_TENSORS = (
    "Tensor x, "
    + ", ".join(f"Tensor{'?' if name.endswith('bias') else ''} {name}" for name in PARAMETERS)
    + ", Tensor? cos, Tensor? sin, Tensor? seeds"
)
_SAVED = "Tensor y1, Tensor mean1, Tensor rstd1, Tensor qkv, Tensor attended, Tensor lse, Tensor h, Tensor y2," \
         " Tensor mean2, Tensor rstd2, Tensor u, Tensor g"  # fmt: skip
_OPTIONS = (
    "int heads, int kv_heads, bool causal, str activation, str norm, float eps, float attention_dropout,"
    " float branch_dropout"
)
_forward = define(
    OP, "forward", f"({_TENSORS}, {_OPTIONS}, str backend) -> ({', '.join(['Tensor'] * 13)})", _fake_forward
)
_backward = define(
    OP,
    "backward",
    f"(Tensor dout, {_TENSORS}, {_SAVED}, {_OPTIONS}, bool frozen, str backend) -> ({', '.join(['Tensor'] * 13)})",
    _fake_backward,
)


class _TransformerBlock(torch.autograd.Function):
    """Takes x, the parameters and, where the products get other values, those; saves what forward() returns."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, parameters, lowered = arguments[0], arguments[1:13], arguments[13:21]
        tensors, options = (*_used(parameters, lowered), *arguments[21:24]), arguments[24:]
        out, *saved = _forward(x, *tensors, *options)
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.options = options
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return out

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dout: Tensor) -> Any:
        *options, backend = ctx.options
        frozen = not ctx.needs_input_grad[3]
        dx, *found = _backward(dout, *ctx.saved_tensors, *options, frozen, backend)
        rest = (None,) * (len(ctx.options) + 11)
        if frozen:
            return dx, *(None,) * 12, *rest
        return dx, *(None if d is None else cast(g, d) for g, d in zip(found, ctx.dtypes, strict=True)), *rest


def _used(parameters: Sequence[Tensor | None], lowered: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The parameters as the products take them."""
    used = list(parameters)
    for i, tensor in zip(LINEAR, lowered, strict=True):
        if tensor is not None:
            used[i] = tensor
    return used


def takes(x: Tensor) -> bool:
    """Whether nn.TransformerBlock shall call transformer_block for this x: eager, on kernels of its own."""
    return (
        x.is_cpu and x.dtype in DTYPES and type(x) is Tensor and _dispatch._forced in (None, "cpu")
        and native.missing() is None and not torch.compiler.is_compiling()
    )  # fmt: skip


def transformer_block(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
    causal: bool = True,
    activation: str = "gelu",
    norm: str = "layer",
    eps: float = 1e-5,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    lowered: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """h = x + dropout(attention(norm1(x))), h + dropout(mlp(norm2(h))): the pre-norm block (Xiong et al. 2020,
    arXiv:2002.04745), with attention(y) = out(attention of the heads of qkv(y)) and mlp(y) = down(act(up(y))).

    The same kernels and numbers as the ops one by one; what goes away is the time between them, 60 us a node of
    autograd, and copies: q, k and v are read from the product that makes them and their gradients are written where the
    next product reads.

    Args:
        x: (B, S, C), float32 or bfloat16 (any floating dtype on "reference").
        parameters: twelve tensors in the order of PARAMETERS: norm1 weight and bias (C,), qkv ((H + 2 Hk) * D, C), out
            (C, C), norm2, up (F, C), or (2 F, C) for gated activations, and down (C, F); None for a bias that is not
            there. All of them get gradients where qkv_weight requires one, else none does.
        rope: (cos, sin), (S, D / 2) float32 each; q and k are rotated in halves.
        heads, kv_heads: H and Hk, None for H; D = C / H, up to 256 on "cpu".
        causal: position s sees positions 0 to s.
        activation: "gelu", "gelu_tanh", "swiglu" or "geglu".
        norm: "layer" or "rms"; eps is added to the variance or mean square.
        attention_dropout, dropout: probabilities in [0, 1), of attention weights and of what both branches add.
        lowered: values of the parameters of the four products (qkv, out, up, down, weight and bias each) in the dtype
            the products are to run in; None for their own. The gradients are the parameters'.
        backend: "cpu" or "reference"; None chooses.

    Returns:
        (B, S, C), dtype of x, contiguous.

    Raises:
        ValueError: shapes, devices, dtypes or options do not agree.
        TypeError: x is not floating point.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: the parameters as the products take them, and of every position, where F' = F or 2 F: in the
    dtype of the products 3 C + (H + 2 Hk) * D + F' + F numbers, C more in that of x beside x, and H + 4 in float32. No
    double backward.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_choice("activation", activation, *ACTIVATIONS)
    lowered = (None,) * 8 if lowered is None else lowered
    _check(x, parameters, lowered, rope, heads, kv_heads, activation in ("swiglu", "geglu"))
    check_choice("norm", norm, "layer", "rms")
    check_dropout(attention_dropout)
    check_dropout(dropout)
    name = OP.select(x, backend, head_dim=x.shape[2] // heads)
    count = bool(attention_dropout) + 2 * bool(dropout)
    seeds = None
    if count:  # in the order the ops one by one would draw them
        seeds = torch.randint(2**63 - 1, (count,), device=x.device)
        if count == 2:
            seeds = torch.cat((seeds[:1], seeds))
        elif count == 1:
            seeds = seeds.expand(3).contiguous()
    options = (heads, kv_heads, bool(causal), activation, norm, float(eps), float(attention_dropout), float(dropout))
    rest = (*(rope or (None, None)), seeds, *options, name)
    if torch.is_grad_enabled():
        return _TransformerBlock.apply(x, *parameters, *lowered, *rest)
    return _forward(x, *_used(parameters, lowered), *rest)[0]


def _check(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    lowered: Sequence[Tensor | None],
    rope: tuple[Tensor, Tensor] | None,
    heads: int,
    kv_heads: int,
    gated: bool,
) -> None:
    check_floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must be (B, S, C), got shape {tuple(x.shape)}")
    if len(parameters) != 12 or any(parameters[i] is None for i in range(0, 12, 2)):
        raise ValueError(f"parameters must be twelve, of which biases may be None: {', '.join(PARAMETERS)}")
    _, S, C = x.shape
    if heads < 1 or kv_heads < 1 or heads % kv_heads or C % heads:
        raise ValueError(f"heads must divide C and kv_heads heads, got C={C}, {heads} and {kv_heads}")
    hidden, device, used = parameters[10].shape[-1], x.device, _used(parameters, lowered)  # type: ignore[union-attr]
    qkv, up = C + 2 * kv_heads * (C // heads), 2 * hidden if gated else hidden
    shapes = ((C,), (C,), (qkv, C), (qkv,), (C, C), (C,), (C,), (C,), (up, C), (up,), (C, hidden), (C,))
    for name, given, tensor, shape in zip(PARAMETERS, parameters, used, shapes, strict=True):
        if given is None:
            continue
        if given.shape != shape or tensor is None or tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to go with x, {tuple(x.shape)}, got {tuple(given.shape)}")
        if tensor.device != device:
            check_device(name, tensor, x, "x")
    for i in LINEAR:
        tensor = used[i]
        if tensor is not None and tensor.dtype is not used[2].dtype:  # type: ignore[union-attr]
            raise ValueError(f"{PARAMETERS[i]} must have the dtype of qkv_weight, got {tensor.dtype}")
    for name, table in zip(("cos", "sin"), rope or (), strict=False):
        if table.shape != (S, C // heads // 2) or table.device != device:
            raise ValueError(f"{name} must be {(S, C // heads // 2)} on {device}, got {tuple(table.shape)}")
