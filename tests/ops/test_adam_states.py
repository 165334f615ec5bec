"""adam_step with moments of 8 and 16 bits: every case on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.adam import OP
from tests.ops.adam_problem import BITS, Problem, duplicate, make, quantized
from tests.ops.harness import assert_same_bits, each_backend, each_dtype, on, refuses

# --- 8-bit states ----------------------------------------------------------------------------------------------------


def test_code_books() -> None:
    for signed in (True, False):
        book, _ = ops.adam.blockwise.code_book(signed, torch.device("cpu"))
        edges = [torch.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1, dtype=torch.float64) for i in range(7)]
        values = torch.cat([(e[1:] + e[:-1]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        expected = torch.cat([-values, zero, values, one] if signed else [zero, values, one]).sort().values
        assert len(book) == 256
        torch.testing.assert_close(book.double(), expected, rtol=2e-7, atol=0)
        for values in (torch.randn(1000), torch.randn(1000) * 1e-30, torch.randn(3, 500).t(), torch.zeros(300)):
            moment = values if signed else values.abs()
            codes, absmax = ops.adam.quantize(moment, signed=signed)
            back = ops.adam.dequantize(codes, absmax, signed=signed)
            assert back.stride() == moment.stride() and codes.dtype is torch.uint8
            assert len(absmax) == -(-moment.numel() // 256)
            scale = moment.abs().max()
            assert bool(((back - moment).abs() <= (0.0072 if signed else 0.0036) * scale).all())
            again, _ = ops.adam.quantize(back, signed=signed)
            assert signed or torch.equal(again, codes)  # -1 is no code: a largest magnitude below zero shrinks
    tiny = torch.tensor([1.0, 1e-12, 0.0])
    codes, _ = ops.adam.quantize(tiny, signed=False)
    assert codes.tolist() == [255, 1, 0]  # a second moment above zero never becomes zero
    codes, absmax = ops.adam.quantize(torch.tensor([1.0, float("nan")]), signed=True)
    assert bool(ops.adam.dequantize(codes, absmax, signed=True).isnan().all())


@each_backend
@each_dtype
def test_8_bit_states(backend: str, dtype: torch.dtype) -> None:
    """The step of the reference, with codes at most one off where rounding differs; decoded, that of float32 states."""
    params, grads = make(dtype), make(dtype)
    ours = quantized(params)
    if refuses(OP, backend, params[0], BITS):
        with on(backend), pytest.raises(fastlm.UnsupportedError, match="no state_bits"):
            ours.step(grads)
        return
    theirs, wide = duplicate(ours), Problem(params)
    names = (("exp_avgs", True), ("exp_avg_sqs", False))
    for name, signed in names:
        for codes, absmax, moment in zip(
            getattr(ours, name), ours.options[f"{name[:-1]}_absmaxes"], getattr(wide, name), strict=True
        ):
            moment.copy_(ops.adam.dequantize(codes, absmax, signed=signed))
    options = {"weight_decay": 0.1, "decoupled": True, "grad_scale": torch.tensor(2.0)}
    with on(backend):
        ours.step(grads, **options)
    theirs.step(grads, backend="reference", **options)
    wide.step(grads, backend="reference", **options)
    torch.testing.assert_close(ours.params, wide.params, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for name, signed in names:
        for codes, expected, absmax, moment in zip(
            getattr(ours, name), getattr(theirs, name), ours.options[f"{name[:-1]}_absmaxes"], getattr(wide, name),
            strict=True,
        ):  # fmt: skip
            off = (codes.int() - expected.int()).abs()
            assert off.numel() == 0 or (off.max() <= 1 and (off > 0).sum() <= 1 + 1e-3 * off.numel())
            back = ops.adam.dequantize(codes, absmax, signed=signed)
            largest = absmax.repeat_interleave(256)[: moment.numel()].view(moment.shape)
            assert bool(((back - moment).abs() <= 0.0072 * largest + 1e-12).all())
    before = [t.clone() for t in ours.tensors()]
    with on(backend):
        ours.step(grads, found_inf=torch.tensor(1.0))
    assert_same_bits(ours.tensors(), before)


@each_backend
def test_8_bit_states_in_the_order_of_the_parameter(backend: str) -> None:
    values, grad = torch.randn(40, 130), torch.randn(40, 130)
    if refuses(OP, backend, values, BITS):
        return
    plain = quantized([values.t().contiguous()])
    turned = duplicate(plain)
    for tensors in (turned.params, turned.exp_avgs, turned.exp_avg_sqs):
        tensors[0] = tensors[0].t()
    with on(backend):
        plain.step([grad.t()])
        turned.step([grad])
    assert torch.equal(turned.params[0], plain.params[0].t())
    assert torch.equal(turned.exp_avgs[0], plain.exp_avgs[0].t())
    turned.params[0] = turned.params[0].contiguous()
    with on(backend), pytest.raises(ValueError, match="strides"):
        turned.step([grad])


# --- bfloat16 moments -------------------------------------------------------------------------------------------------


def with_low_moments(params: list[Tensor], **options: bool) -> Problem:
    problem = Problem(params, **options)
    problem.exp_avgs = [(torch.randn_like(m) * 0.1).bfloat16() for m in problem.exp_avgs]
    problem.exp_avg_sqs = [torch.randn_like(m).square().bfloat16() for m in problem.exp_avg_sqs]
    return problem


@each_backend
@pytest.mark.parametrize("how", ["nearest", "masters", "seeds", "amsgrad"])
def test_bfloat16_moments(backend: str, how: str) -> None:
    """The step of float32 moments, which are then rounded to one of their two neighbours: the same one everywhere."""
    params, grads = make(torch.bfloat16), make(torch.bfloat16)
    params[5], grads[5] = (t[5].t().contiguous().t() for t in (params, grads))  # the hash counts in memory order
    ours = with_low_moments(params, **({} if how == "nearest" else {how: True}))
    if refuses(OP, backend, params[0], {"bfloat16_moments"}):
        with on(backend), pytest.raises(fastlm.UnsupportedError, match="no bfloat16_moments"):
            ours.step(grads)
        return
    wide, theirs = duplicate(ours), duplicate(ours)
    wide.exp_avgs, wide.exp_avg_sqs = ([m.float() for m in ms] for ms in (wide.exp_avgs, wide.exp_avg_sqs))
    with on(backend):
        ours.step(grads, weight_decay=0.1, decoupled=True)
        wide.step(grads, weight_decay=0.1, decoupled=True)
    theirs.step(grads, weight_decay=0.1, decoupled=True, backend="reference")
    assert_same_bits(ours.params, wide.params)
    for name in ("exp_avgs", "exp_avg_sqs"):
        for low, exact, expected in zip(getattr(ours, name), getattr(wide, name), getattr(theirs, name), strict=True):
            assert low.dtype is torch.bfloat16
            assert bool(((low.float() - exact).abs() <= 2**-7 * exact.abs() + 1e-30).all())
            assert (low != expected).sum() <= 1 + 2e-3 * low.numel()


@each_backend
def test_bfloat16_moments_decay(backend: str) -> None:
    """beta2 = 0.999 moves a second moment by less than half an ulp: to nearest it would stay where it is."""
    problem = Problem([torch.ones(4096, dtype=torch.bfloat16)])
    problem.exp_avgs, problem.exp_avg_sqs = ([torch.ones(4096, dtype=torch.bfloat16)] for _ in range(2))
    if refuses(OP, backend, problem.params[0], {"bfloat16_moments"}):
        return
    grads, steps = [torch.zeros(4096, dtype=torch.bfloat16)], 200
    with on(backend):
        for _ in range(steps):
            problem.step(grads)
    assert problem.exp_avg_sqs[0].float().mean().item() == pytest.approx(0.999**steps, rel=2e-3)
    assert problem.exp_avgs[0].float().mean().item() == pytest.approx(0.9**steps, rel=2e-2)
