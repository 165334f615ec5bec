"""adam_step and grad_norm: Adam over a list of tensors in one call, and the norm that clipping needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import cuda, native
from fastlm._dispatch import LOW_PRECISION, Backend, Op
from fastlm._walk import memory_order
from fastlm.kernels import _platform
from fastlm.reference import adam as blockwise
from fastlm.reference.adam import BLOCK

LOW = (torch.bfloat16, torch.float16)
OP = Op(
    "adam",
    Backend(
        "cpu", "fastlm.native.adam", frozenset({"cpu"}), LOW_PRECISION,
        features=frozenset({"state_bits", "shadow_params", "bfloat16_moments"}), missing=native.missing,
    ),
    Backend(
        "triton", "fastlm.kernels.adam", _platform.DEVICES, LOW_PRECISION, features=frozenset({"state_bits"}),
        missing=_platform.missing,
    ),
    Backend(
        "cuda", "fastlm.cuda.adam", cuda.DEVICES, LOW_PRECISION, features=frozenset({"state_bits", "shadow_params"}),
        missing=cuda.missing, unverified=True,
    ),
    Backend("reference", "fastlm.reference.adam"),
)  # fmt: skip


def state_dtype(param: Tensor) -> torch.dtype:
    """dtype of the moments and of a master copy."""
    return torch.float64 if param.dtype is torch.float64 else torch.float32


def quantize(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """A dense float32 moment as adam_step's 8-bit codes, of its shape and strides, and the largest magnitudes."""
    codes = torch.empty_like(moment, dtype=torch.uint8)
    absmax = torch.empty(-(-moment.numel() // BLOCK), dtype=torch.float32, device=moment.device)
    blockwise.quantize(moment, codes, absmax, signed=signed)
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """The float32 moment that codes stand for."""
    return blockwise.dequantize(codes, absmax, signed=signed)


class Prepared:
    """Parameters with their state, checked once: what adam_step() makes at each call and an optimizer keeps."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        max_exp_avg_sqs: Sequence[Tensor] | None = None,
        master_params: Sequence[Tensor] | None = None,
        rounding_seeds: Sequence[int] | None = None,
        exp_avg_absmaxes: Sequence[Tensor] | None = None,
        exp_avg_sq_absmaxes: Sequence[Tensor] | None = None,
        shadow_params: Sequence[Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        if not params:
            raise ValueError("params must hold at least one tensor, got none")
        first = params[0]
        for p in params:
            if not p.is_floating_point():
                raise TypeError(f"params must be floating point, got {p.dtype}")
            if p.dtype is not first.dtype or p.device != first.device:
                raise ValueError(
                    f"params of one call must share dtype and device, got {p.dtype} on {p.device} beside {first.dtype} "
                    f"on {first.device}; make one call for each"
                )
        if (master_params or rounding_seeds) and first.dtype not in LOW:
            raise ValueError(
                f"master_params and rounding_seeds are for bfloat16 and float16 parameters, got {first.dtype}"
            )
        if master_params and rounding_seeds:
            raise ValueError("master_params and rounding_seeds exclude each other, got both")
        exact, quantized = state_dtype(first), bool(exp_avg_absmaxes or exp_avg_sq_absmaxes)
        if quantized:
            if max_exp_avg_sqs or exact is torch.float64:
                raise ValueError("8-bit states are for parameters other than float64, without max_exp_avg_sqs")
            _check_blocks("exp_avg_absmaxes", exp_avg_absmaxes or (), params)
            _check_blocks("exp_avg_sq_absmaxes", exp_avg_sq_absmaxes or (), params)
        if shadow_params and (first.dtype is not torch.float32 or shadow_params[0].dtype not in LOW):
            raise ValueError(
                "shadow_params must be bfloat16 or float16 copies of float32 parameters, got "
                f"{shadow_params[0].dtype} for {first.dtype}"
            )
        low = exp_avgs[0].dtype is torch.bfloat16 if exp_avgs else False
        if low and first.dtype is not torch.bfloat16:
            raise ValueError(f"bfloat16 moments are for bfloat16 parameters, got {first.dtype}")
        moment = torch.uint8 if quantized else torch.bfloat16 if low else exact
        for name, tensors, dtype in (
            ("exp_avgs", exp_avgs, moment), ("exp_avg_sqs", exp_avg_sqs, moment),
            ("max_exp_avg_sqs", max_exp_avg_sqs, exact), ("master_params", master_params, exact),
            ("shadow_params", shadow_params, shadow_params[0].dtype if shadow_params else exact),
        ):  # fmt: skip
            if tensors:
                _check_like(name, tensors, params, dtype)
        for codes, param in zip([*exp_avgs, *exp_avg_sqs], [*params, *params], strict=True) if quantized else ():
            if codes.stride() != memory_order(param):
                raise ValueError(
                    f"exp_avgs and exp_avg_sqs of 8 bits must have strides {memory_order(param)}, as the parameter's "
                    f"elements lie, got {codes.stride()}"
                )
        _check_length("steps", steps, params)
        for step in steps:
            if step.numel() != 1 or step.dtype is not torch.float32:
                raise ValueError(f"steps must be float32 of one element, got {step.dtype} of shape {tuple(step.shape)}")
        if rounding_seeds:
            _check_length("rounding_seeds", rounding_seeds, params)
        asked = {"state_bits": quantized, "shadow_params": shadow_params, "bfloat16_moments": low}
        self.backend = OP.select(first, backend, frozenset(name for name, used in asked.items() if used))
        self._impl = OP.module(self.backend)
        self._tensors = self._impl.Prepared(
            params, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs or (), master_params or (), rounding_seeds or (),
            exp_avg_absmaxes or (), exp_avg_sq_absmaxes or (), shadow_params or (),
        )  # fmt: skip

    def current(self) -> bool:
        """Whether the tensors still lie where they lay; if not, prepare again."""
        return self._tensors.current()

    def step(
        self,
        grads: Sequence[Tensor],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        self._impl.forward(
            self._tensors, grads, lr, *betas, eps, weight_decay, decoupled, maximize, grad_scale, found_inf
        )


def _check_length(name: str, values: Sequence[Any], params: Sequence[Tensor]) -> None:
    if len(values) != len(params):
        raise ValueError(f"{name} must hold {len(params)} values like params, got {len(values)}")


def _check_like(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype) -> None:
    _check_length(name, tensors, params)
    for tensor, param in zip(tensors, params, strict=True):
        if tensor.shape != param.shape or tensor.dtype is not dtype or tensor.device != param.device:
            raise ValueError(
                f"{name} must be {tuple(param.shape)} of {dtype} on {param.device} for a parameter of {param.dtype}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )


def _check_blocks(name: str, absmaxes: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    _check_length(name, absmaxes, params)
    for absmax, param in zip(absmaxes, params, strict=True):
        shape = (-(-param.numel() // BLOCK),)
        if absmax.shape != shape or absmax.dtype is not torch.float32 or absmax.device != param.device:
            raise ValueError(
                f"{name} must be {shape} of torch.float32 on {param.device} for a parameter of {param.numel()} "
                f"elements, got {tuple(absmax.shape)} of {absmax.dtype} on {absmax.device}"
            )


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    master_params: Sequence[Tensor] | None = None,
    rounding_seeds: Sequence[int] | None = None,
    exp_avg_absmaxes: Sequence[Tensor] | None = None,
    exp_avg_sq_absmaxes: Sequence[Tensor] | None = None,
    shadow_params: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of Adam (Kingma and Ba 2014, arXiv:1412.6980) or AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101),
    in place, on all parameters in one call.

    With t the step after it was incremented and g = grad / grad_scale (minus that if `maximize`, plus
    weight_decay * param unless `decoupled`):

        exp_avg    = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        param     -= lr * (exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
                           [+ weight_decay * param if decoupled])

    Computes in float32 (float64 for float64), bias corrections in double. No autograd. The gradients are not written.

    Args:
        params: tensors of one dtype (float32, bfloat16, float16, float64) and device; any strides.
        grads: their gradients, same shapes.
        exp_avgs, exp_avg_sqs: moments, shapes of params, float32 (float64 for float64); bfloat16 beside bfloat16
            parameters, rounded up or down with probability by nearness, by a hash of (rounding seed or 0, step, index):
            to nearest, a second moment would never decay.
        steps: one float32 number for each parameter, steps done so far; "triton" and "cuda" need them on the
            parameters' device.
        max_exp_avg_sqs: like exp_avg_sqs; given, the largest second moment so far takes the second moment's place
            (AMSGrad, openreview ryQu7f-RZ).
        master_params: float32 copies of 16-bit parameters; they are updated and the parameters are their rounding.
            Elements of a parameter changed since the last step count in place of the copy's.
        rounding_seeds: one 63-bit integer for each 16-bit parameter; given, the result is rounded up or down with
            probability by nearness, by a hash of (seed, step, index): the same call gives the same bits.
        exp_avg_absmaxes, exp_avg_sq_absmaxes: given, the moments are 8-bit codes (Dettmers et al. 2021,
            arXiv:2110.02861), uint8 with the memory order of the parameter: each is a place in a table of 256 values
            between -1 (0 for exp_avg_sq) and 1, times the largest magnitude of its block of 256 elements, which
            stands here, float32, (ceil(numel / 256),). The update is made with float32 moments, which are rounded to
            the nearest codes. quantize() and dequantize() convert.
        shadow_params: bfloat16 or float16 copies of float32 parameters; the step overwrites them with the rounding of
            the new parameters while it holds those: nothing need cast before the next matrix product. Any strides.
        lr, betas, eps, weight_decay: the numbers of the formula. A tensor for lr is read on the device by "triton" and
            "cuda".
        grad_scale: one-element tensor the gradients are divided by. None stands for 1.
        found_inf: one-element tensor; anything but zero leaves every tensor, steps included, as it was.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Raises:
        ValueError: shapes, dtypes, devices or lengths do not agree.
        TypeError: a parameter is not floating point, or a gradient has no memory of its own.
        UnsupportedError: the backend asked for cannot run this.
    """
    _check_length("grads", grads, params)
    for grad, param in zip(grads, params, strict=True):
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"grads must be {tuple(param.shape)} on {param.device} like the parameter, got {tuple(grad.shape)} on "
                f"{grad.device}"
            )
    if not params:
        return
    Prepared(
        params, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs=max_exp_avg_sqs, master_params=master_params,
        rounding_seeds=rounding_seeds, exp_avg_absmaxes=exp_avg_absmaxes, exp_avg_sq_absmaxes=exp_avg_sq_absmaxes,
        shadow_params=shadow_params, backend=backend,
    ).step(
        grads, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Euclidean norm of all gradients together, as torch.nn.utils.get_total_norm, in one pass over them.

    norm = sqrt(sum g^2), accumulated in float64 whatever the dtype of the gradients, in an order that does not depend
    on the number of threads.

    Args:
        grads: dense tensors of any floating dtypes and devices.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses.

    Returns:
        0-d float32 (float64 if any gradient is), on the device of the first gradient; 0 for an empty list.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    if not kinds:
        return torch.tensor(0.0)
    parts = [OP.module(OP.select(kind[0], backend)).norm(kind) for kind in kinds.values()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total.sqrt().to(torch.float64 if any(d is torch.float64 for d, _ in kinds) else torch.float32)
