"""attention_varlen: attention over sequences of different lengths, packed one behind the other."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm.ops.attention import Causal, Window, attend, check_integer, check_tensors


def _check_packing(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int | None
) -> tuple[int, int]:
    """The longest lengths."""
    if max_seqlen_k is None:
        if cu_seqlens_k is not cu_seqlens_q:
            raise ValueError("max_seqlen_k must be given with cu_seqlens_k, got None")
        max_seqlen_k = max_seqlen_q
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integer(name, cu, q, torch.int32)
        if cu.dim() != 1 or cu.shape[0] == 0:
            raise ValueError(f"{name} must be (sequences + 1,), got {tuple(cu.shape)}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        came = f"{tuple(cu_seqlens_k.shape)} and {tuple(cu_seqlens_q.shape)}"
        raise ValueError(f"cu_seqlens_k must have the shape of cu_seqlens_q, got {came}")
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {length!r}")
    return max_seqlen_q, max_seqlen_k


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    causal: Causal = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """fastlm.ops.attention for N sequences of different lengths, packed one behind the other without padding.

    Sequence n is rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q and rows cu_seqlens_k[n] to cu_seqlens_k[n + 1] of k
    and v; its queries see its own keys alone, and i, j, S, T in attention's formula count within it.

    Args:
        q: (total_q, H, D), float32, bfloat16, float16 or float64, any strides.
        k: (total_k, Hk, D), v: (total_k, Hk, Dv), dtype of q; H must be a multiple of Hk.
        cu_seqlens_q: (N + 1,) int32 on the device of q: 0, then the running sums of the lengths, which may be 0. The
            values are not checked, as that would wait for the GPU: they must not fall, nor pass total_q.
        cu_seqlens_k: the same for keys; None: as cu_seqlens_q.
        max_seqlen_q: the longest sequence of q in rows, or any larger number: what the GPU's grid is made from.
        max_seqlen_k: the same for keys; None: max_seqlen_q, where cu_seqlens_k is None or cu_seqlens_q itself.
        causal, window, softcap, sinks, scale: as in attention.
        alibi_slopes: (H,), as in attention.
        dropout: as in attention. The hash takes the number of the packed row, and that of the key in its sequence.
        return_lse: also return log(sum(exp(logits))), sinks included.
        backend: as in attention.

    Returns:
        (total_q, H, Dv), dtype of q, contiguous. With return_lse also (H, total_q), float32 (float64 for float64),
        differentiable. Rows behind cu_seqlens_q[-1] give 0 and -inf, and gradients of 0, whatever stands in them.

    Raises:
        ValueError: shapes, devices or options do not agree; max_seqlen_k is missing.
        TypeError: a tensor is not of a dtype allowed for it.
        UnsupportedError: the backend asked for cannot run this.

    Saved for backward: the tensors given, out, lse, and one number as seed of dropout. No double backward.
    """
    check_tensors(q, k, v, "total", "heads", "head dim")
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_seqlens = _check_packing(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, total, D), no copy
    out, lse = attend(q, k, v, None, (None, None), cu_seqlens, max_seqlens, causal, window, softcap, alibi_slopes,
                       sinks, scale, dropout, backend)  # fmt: skip
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out
