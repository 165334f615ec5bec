"""torch.nn.functional's own signatures and semantics over fastlm.ops: changing the import is the whole migration.

What torch refuses is refused with the same type of exception; torch.autocast acts on these as on torch's. Every other
name of torch.nn.functional is found here too, as it stands there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from fastlm import ops
from fastlm.nn._autocast import autocast_dtype, lower, lower_values
from fastlm.nn._losses import cross_entropy, linear_cross_entropy

__all__ = [
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch.nn.functional.dropout over ops.dropout on the CPU, where torch's generator is serial; else torch's own.

    Args:
        input: any shape; torch's own function serves integers, scalars and a p of 0 or 1.
        p: probability of dropping an element; the others are divided by 1 - p.
        training: False returns input.
        inplace: torch's own function serves it.

    Returns:
        Shape and dtype of input. Raises what torch raises.
    """
    fits = training and not inplace and 0.0 < p < 1.0 and input.is_cpu and input.dim() and input.is_floating_point()
    if not fits or has_torch_function_unary(input):
        return torch.nn.functional.dropout(input, p, training, inplace)
    return ops.dropout(input, p)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu over ops.gelu.

    Args:
        input: any shape.
        approximate: "none" or "tanh".

    Returns:
        Shape and dtype of input. Raises what torch raises.
    """
    if has_torch_function_unary(input) or not input.is_floating_point() or approximate not in ("none", "tanh"):
        return torch.nn.functional.gelu(input, approximate=approximate)
    return ops.gelu(input, approximate=approximate)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm over ops.layer_norm: normalises the last len(normalized_shape) dimensions.

    Args:
        input: (..., *normalized_shape).
        weight, bias: normalized_shape, in the dtype of input; both may be float32 where input is bfloat16 or float16.

    Returns:
        Shape and dtype of input.

    Raises:
        What torch.nn.functional.layer_norm raises: it is called where the arguments do not agree.
    """
    if not _norm_agrees(input, normalized_shape, weight, bias):
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    if len(normalized_shape) == 1:
        return ops.layer_norm(input, weight, bias, eps)
    rows = _rows(input, normalized_shape)
    return ops.layer_norm(rows, _flat(weight), _flat(bias), eps).view(input.shape)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm over ops.rms_norm: as layer_norm, without mean and bias.

    Args:
        input: (..., *normalized_shape).
        weight: normalized_shape, any floating dtype.
        eps: None stands for the machine epsilon of the dtype it accumulates in, float32 (float64 for float64).

    Returns:
        Shape and dtype of input.

    Raises:
        What torch.nn.functional.rms_norm raises: it is called where the arguments do not agree.
    """
    if not _norm_agrees(input, normalized_shape, weight, None, any_dtype=True):
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
    if len(normalized_shape) == 1:
        return ops.rms_norm(input, weight, eps)
    return ops.rms_norm(_rows(input, normalized_shape), _flat(weight), eps).view(input.shape)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """torch.nn.functional.embedding over ops.embedding: the rows of weight that input names.

    Args:
        input: any shape, int64 or int32.
        weight: (V, N).
        padding_idx: the row that gets no gradient.
        max_norm, norm_type, scale_grad_by_freq, sparse: torch's own function serves a call that uses them.

    Returns:
        (*input.shape, N), dtype of weight. Raises what torch raises; but on a GPU an index out of range gives a row of
        NaN, where torch stops the device.
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(
            embedding,
            (input, weight),
            input,
            weight,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
    fits = (
        weight.dim() == 2
        and weight.is_floating_point()
        and input.dtype in (torch.int64, torch.int32)
        and input.device == weight.device
        and weight.shape[0] > 0
        and (padding_idx is None or -weight.shape[0] <= padding_idx < weight.shape[0])
    )
    if not fits or max_norm is not None or scale_grad_by_freq or sparse:
        return torch.nn.functional.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return ops.embedding(input, weight, padding_idx)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear over ops.linear where the products are in bfloat16 on a CPU, else torch's own.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features); under autocast its shadow is read, where an optimizer keeps one.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), in the dtype of input, under autocast in autocast's. Raises what torch raises.
    """
    dtype = autocast_dtype(input.device) if input.is_cpu else None
    if not _linear_fits(input, weight, bias, dtype):
        return torch.nn.functional.linear(input, weight, bias)
    values = None if dtype is None or weight.dtype is dtype else lower_values(weight, dtype)
    return ops.linear(input, weight, bias, values=values)


def _linear_fits(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether products in the autocast dtype (None: outside autocast) are for ops.linear."""
    if not input.is_cpu or (dtype or input.dtype) is not torch.bfloat16:
        return False
    if has_torch_function_variadic(input, weight, bias) or not input.dim() or weight.dim() != 2:
        return False
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if dtype is None:
        dtypes = all(t.dtype is torch.bfloat16 for t in tensors)
    else:
        dtypes = all(t.dtype in _LOWERED for t in tensors)
    return (
        dtypes and all(t.is_cpu for t in tensors) and input.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )  # fmt: skip


_LOWERED = frozenset({torch.float32, torch.bfloat16, torch.float16})


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """torch.nn.functional.softmax over ops.softmax.

    Args:
        input: any shape.
        dim: the dimension that sums to one; None is deprecated, as in torch.
        dtype: input is cast to it first.

    Returns:
        Shape of input; dtype, or that of input (float32 under autocast on a GPU). Raises what torch raises.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    if not _softmax_fits(input, dim, dtype):
        return torch.nn.functional.softmax(input, dim, _stacklevel + 1, dtype)
    return _softmax(input, dim, dtype, False)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """torch.nn.functional.log_softmax over ops.softmax; everything as in softmax."""
    if has_torch_function_unary(input):
        return handle_torch_function(log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    if not _softmax_fits(input, dim, dtype):
        return torch.nn.functional.log_softmax(input, dim, _stacklevel + 1, dtype)
    return _softmax(input, dim, dtype, True)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention over ops.attention: softmax(q k^T * scale + mask) v.

    Args:
        query: (..., H, S, D); key: (..., H, T, D); value: (..., H, T, Dv). At least (S, D); leading dimensions
            broadcast. With enable_gqa the heads of key and value divide those of query.
        attn_mask: broadcastable to (..., H, S, T); bool (True takes part) or added to the scores, in the dtype of
            query or float32.
        dropout_p: probability of dropping an attention weight, whatever the training mode, as in torch.
        is_causal: query s sees keys 0 to s (top-left). Not together with attn_mask.
        scale: None stands for 1 / sqrt(D).

    Returns:
        (..., H, S, Dv), dtype of query; under autocast its dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices do not agree; attn_mask and is_causal both given; dropout_p not in
            [0, 1]. IndexError: enable_gqa without a head dimension, a mask of one dimension.
    """
    dtype = autocast_dtype(query.device) if isinstance(query, Tensor) else None
    query, key, value, attn_mask = (lower(t, dtype) for t in (query, key, value, attn_mask))  # type: ignore[assignment]
    _check_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if enable_gqa:
        key, value = _group(query, key, value)
    lead = query.shape[:-2]
    plain = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
    if plain and key.shape[1] == value.shape[1] and (enable_gqa or query.shape[1] == key.shape[1]):
        _check_mask(attn_mask, (*lead, query.shape[2], key.shape[2]))
        return ops.attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale, dropout=dropout_p)

    # Any other number of leading dimensions becomes (B, H): expanded views, copied only where no view exists.
    heads = key.shape[-3] if enable_gqa else None
    others = ((*t.shape[:-3], lead[-1]) if enable_gqa else t.shape[:-2] for t in (key, value))
    lead = torch.broadcast_shapes(lead, *others)
    _check_mask(attn_mask, (*lead, query.shape[-2], key.shape[-2]))
    if attn_mask is not None and len(lead) > 2 and attn_mask.dim() > 3:
        last = attn_mask.shape[-2:]
        attn_mask = attn_mask.expand(*lead, *last).reshape(-1, lead[-1], *last)
    q, k, v = _four(query, lead), _four(key, lead, heads), _four(value, lead, heads)
    out = ops.attention(q, k, v, mask=attn_mask, causal=is_causal, scale=scale, dropout=dropout_p)
    return out.reshape(*lead, *out.shape[-2:])


def _softmax_fits(input: Tensor, dim: int | None, dtype: torch.dtype | None) -> bool:
    """Whether ops.softmax takes these. On the CPU torch's own kernel takes every dimension as it lies."""
    wanted = input.dtype if dtype is None else dtype
    if dim is None or not wanted.is_floating_point or not -input.dim() <= dim < input.dim():
        return False
    return not input.is_cpu or dim in (-1, input.dim() - 1)


def _softmax(input: Tensor, dim: int | None, dtype: torch.dtype | None, log: bool) -> Tensor:
    assert dim is not None
    if dtype is None and input.is_cuda and autocast_dtype(input.device) and input.dtype is not torch.float64:
        dtype = torch.float32  # as torch.autocast does there
    input = input if dtype is None else input.to(dtype)
    if dim in (-1, input.dim() - 1):
        return ops.softmax(input, log=log)
    return ops.softmax(input.movedim(dim, -1), log=log).movedim(-1, dim)


def _norm_agrees(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, any_dtype: bool = False
) -> bool:
    """Whether torch would take these; where not, torch's own function says why."""
    if not (isinstance(input, Tensor) and isinstance(shape, (list, tuple)) and input.is_floating_point()):
        return False
    size = tuple(shape)
    if not size or input.shape[-len(size) :] != size:
        return False
    parameters = [p for p in (weight, bias) if p is not None]
    if not all(isinstance(p, Tensor) and p.shape == size and p.device == input.device for p in parameters):
        return False
    if any_dtype:
        return all(p.is_floating_point() for p in parameters)
    if all(p.dtype is input.dtype for p in parameters):
        return True
    low = input.dtype in (torch.bfloat16, torch.float16)
    return low and all(p.dtype is torch.float32 for p in parameters)


def _rows(input: Tensor, shape: Sequence[int]) -> Tensor:
    return input.reshape(*input.shape[: -len(shape)], math.prod(shape))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    for name, tensor in named:
        if tensor.dim() < 2:
            raise RuntimeError(f"{name} must have at least 2 dimensions (length, width), got {tuple(tensor.shape)}")
        if tensor.dtype is not query.dtype or not tensor.is_floating_point():
            raise RuntimeError(f"query, key and value must have one floating dtype, got {name} of {tensor.dtype}")
        if tensor.device != query.device:
            raise RuntimeError(f"query, key and value must be on one device, got {name} on {tensor.device}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"query and key must have one width, got {query.shape[-1]} and {key.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"key and value must have one length, got {key.shape[-2]} and {value.shape[-2]}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if mask is None:
        return
    if is_causal:
        raise RuntimeError("attn_mask must be None when is_causal is True, got both")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask must be bool, float32 or {query.dtype} like query, got {mask.dtype}")
    if mask.device != query.device:
        raise RuntimeError(f"attn_mask must be on the device of query, {query.device}, got {mask.device}")
    if mask.dim() < 2:
        raise IndexError(f"attn_mask must have at least 2 dimensions, got {tuple(mask.shape)}")


def _check_mask(mask: Tensor | None, goal: tuple[int, ...]) -> None:
    if mask is None:
        return
    pairs = zip(reversed(mask.shape), reversed(goal), strict=False)
    if mask.dim() > len(goal) or any(have not in (1, want) for have, want in pairs):
        raise RuntimeError(f"attn_mask must be broadcastable to {goal}, got {tuple(mask.shape)}")


def _group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads that divides query's."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError("enable_gqa needs a head dimension: query, key and value of at least 3 dimensions")
    heads, kv = query.shape[-3], (key.shape[-3], value.shape[-3])
    if any(n == 0 or heads % n for n in kv):
        raise RuntimeError(f"the heads of key and value must divide those of query, {heads}, got {kv[0]} and {kv[1]}")
    if kv[0] != kv[1]:
        return key.repeat_interleave(heads // kv[0], -3), value.repeat_interleave(heads // kv[1], -3)
    return key, value


def _four(tensor: Tensor, lead: torch.Size | tuple[int, ...], heads: int | None = None) -> Tensor:
    """(..., L, D) expanded to (*lead, L, D) as (B, H, L, D); heads stands for the last of lead where given."""
    last = tensor.shape[-2:]
    if not lead:
        return tensor.view(1, 1, *last)
    full = (*lead[:-1], heads if heads is not None else lead[-1])
    return tensor.expand(*full, *last).reshape(-1 if tensor.numel() else math.prod(full[:-1]), full[-1], *last)
