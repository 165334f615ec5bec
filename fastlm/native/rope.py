"""forward() and backward() of rope over the C++ extension."""

from __future__ import annotations

from torch import Tensor

from fastlm.native import DTYPES, address, empty, extension, nothing, output, threads, vector


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    b, _, s, d = q.shape
    (c, cos_address), (_s, sin_address) = vector("cos", cos), vector("sin", sin)
    assert c is not None
    table_stride = c.stride(0) if c.dim() == 3 and c.shape[0] > 1 else 0
    args: list[int] = []
    outs = []
    inputs = []  # keeps copies alive until the kernel has read them
    for name, x in (("q", q), ("k", k)):
        if x is None:
            args += [0] * 9
            outs.append(nothing(q.dtype))
            continue
        x = x if x.stride(3) == 1 else x.contiguous()
        inputs.append(x)
        out = x if in_place else like(x)
        args += [address(name, x, q.dtype, contiguous=False), *x.stride()[:3]]
        args += [output(out), *out.stride()[:3], x.shape[1]]
        outs.append(out)
    extension().rope(
        DTYPES[q.dtype], *args, cos_address, sin_address, table_stride,
        b, s, d, 2 * c.shape[-1], interleaved, inverse, threads(),
    )  # fmt: skip
    return outs[0], outs[1]


def like(x: Tensor) -> Tensor:
    """An output stored as x is: head by head or position by position."""
    b, h, s, d = x.shape
    if x.stride(1) < x.stride(2):
        return empty((b, s, h, d), x.dtype).transpose(1, 2)
    return empty((b, h, s, d), x.dtype)


def forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin, interleaved, False)


def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rotate(dq, dk, cos, sin, interleaved, True)
