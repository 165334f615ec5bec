"""Adam and AdamW: torch.optim's own classes, with a step that updates all parameters in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlm._dispatch import UnsupportedError
from fastlm._shadow import Shadow
from fastlm._walk import memory_order
from fastlm.ops.adam import OP, Prepared, dequantize, grad_norm, quantize, state_dtype

LOW = (torch.bfloat16, torch.float16)
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they have a sign
SMALL = 4096  # parameters of fewer elements keep 32-bit states: biases and norms, which steer more than they weigh
EXACT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")  # state that stays float32 for 16-bit parameters


@dataclass
class _Call:
    """One call of adam_step: parameters of one group, dtype and device, prepared."""

    ids: list[int]
    prepared: Prepared
    params: list[Tensor]
    shadows: list[Shadow] = field(default_factory=list)
    writes: bool = False
    """Whether the backend writes the shadows itself."""

    def step(self, grads: list[Tensor], found_inf: Tensor | None, **options: Any) -> None:
        stale = [s for s in self.shadows if not s.valid()] if found_inf is not None else []
        self.prepared.step(grads, found_inf=found_inf, **options)
        if self.shadows:
            copies = [s.copy for s in self.shadows]
            if not self.writes:
                torch._foreach_copy_(copies, self.params)
            else:
                for shadow in stale:  # if the step was left out, so was the writing
                    shadow.copy.copy_(shadow.param)
                torch.autograd.graph.increment_version(copies)
            for shadow in self.shadows:
                shadow.written()


class _Fused(torch.optim.Adam):
    """The step, the state and the loading that Adam and AdamW share; the rest is torch's."""

    max_norm: float | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    state_bits: int = 32
    shadow_dtype: torch.dtype | None = None
    grad_norm: Tensor | None = None
    """Norm of all gradients at the last step, before clipping and after unscaling, 0-d; None without max_norm."""
    _step_supports_amp_scaling = True  # GradScaler hands grad_scale and found_inf to step() in place of its own pass

    def _configure(
        self,
        differentiable: bool,
        max_norm: float | None,
        master_weights: bool,
        stochastic_rounding: bool,
        state_bits: int,
        shadow_dtype: torch.dtype | None,
    ) -> None:
        if differentiable:
            raise UnsupportedError(
                f"fastlm.optim.{type(self).__name__} updates parameters in place outside autograd: differentiable=True "
                f"needs torch.optim.{type(self).__name__}"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, or None for no clipping, got {max_norm}")
        if master_weights and stochastic_rounding:
            raise ValueError("master_weights and stochastic_rounding exclude each other, got both")
        if state_bits not in (8, 16, 32):
            raise ValueError(f"state_bits must be 32, 16 or 8, got {state_bits}")
        if shadow_dtype not in (None, *LOW):
            raise ValueError(f"shadow_dtype must be torch.bfloat16, torch.float16 or None, got {shadow_dtype}")
        self.state_bits = state_bits
        self.shadow_dtype = shadow_dtype
        self.max_norm = max_norm
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.grad_norm = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: recomputes the loss with gradients and returns it.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # as torch.optim does; torch.compiler.disable would import dynamo with this module
    def _update(self) -> None:
        calls = self._collect()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self.max_norm is not None:
            norm = grad_norm([grad for _, _, grads in calls for grad in grads])
            if scale is not None:
                norm = norm / scale
            self.grad_norm = norm
            clip = ((norm + 1e-6) / self.max_norm).clamp_(min=1)  # the divisor; NaN stays NaN
            scale = clip if scale is None else clip * scale
        for group, call, grads in calls:
            beta1, beta2 = group["betas"]
            call.step(
                grads, found_inf, lr=group["lr"], betas=(float(beta1), float(beta2)), eps=group["eps"],
                weight_decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"],
                maximize=group["maximize"], grad_scale=scale,
            )  # fmt: skip

    def _collect(self) -> list[tuple[dict[str, Any], _Call, list[Tensor]]]:
        """The calls of this step: one for each group, dtype and device. Raises before anything is written."""
        cache: dict[Any, _Call] = self.__dict__.setdefault("_prepared", {})
        calls = []
        for index, group in enumerate(self.param_groups):
            kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                kind = (param.dtype, param.device, self._quantized(param, group))
                params, grads = kinds.setdefault(kind, ([], []))
                params.append(param)
                grads.append(grad)
            for kind, (params, grads) in kinds.items():
                key = (index, *kind, group["amsgrad"])
                ids = self._ids(params)
                found = cache.get(key)
                if found is None or found.ids != ids or not found.prepared.current():
                    found = cache[key] = self._prepare(params, group)
                calls.append((group, found, grads))
        return calls

    def _ids(self, params: list[Tensor]) -> list[int]:
        """Which objects hold the parameters and their state: safe to compare, because the cache keeps them alive."""
        ids, state = [], self.state
        for param in params:
            ids.append(id(param))
            ids.extend(map(id, state[param].values()))
        return ids

    def _quantized(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether the moments of the parameter are kept in 8 bits."""
        if self.state_bits != 8 or param.numel() < SMALL or param.dtype not in (torch.float32, *LOW):
            return False
        if group["amsgrad"]:
            raise ValueError("state_bits=8 and amsgrad exclude each other, got both")
        return True

    def _moment_dtype(self, param: Tensor) -> torch.dtype:
        """Of moments that are not codes."""
        low = self.state_bits == 16 and param.dtype is torch.bfloat16
        return torch.bfloat16 if low else state_dtype(param)

    def _prepare(self, params: list[Tensor], group: dict[str, Any]) -> _Call:
        if not params[0].is_floating_point():
            raise UnsupportedError(
                f"fastlm.optim.{type(self).__name__} takes real floating point parameters, got {params[0].dtype}; "
                f"torch.optim.{type(self).__name__} takes complex ones"
            )
        amsgrad, low = group["amsgrad"], params[0].dtype in LOW
        master, stochastic = self.master_weights and low, self.stochastic_rounding and low
        quantized = self._quantized(params[0], group)
        low_moments = self._moment_dtype(params[0]) is torch.bfloat16
        features = {"state_bits"} if quantized else {"bfloat16_moments"} if low_moments else set()
        backend = OP.select(params[0], features=frozenset(features))
        for param in params:
            self._complete(param, group, backend, amsgrad, master, stochastic)
        states = [self.state[p] for p in params]

        shadows = self._shadow(params)
        writes = bool(shadows) and (backend == "reference" or "shadow_params" in OP.rows[backend].features)

        def every(key: str) -> list[Tensor]:
            return [s[key] for s in states]

        prepared = Prepared(
            params,
            every("exp_avg_codes" if quantized else "exp_avg"),
            every("exp_avg_sq_codes" if quantized else "exp_avg_sq"),
            every("step"),
            max_exp_avg_sqs=every("max_exp_avg_sq") if amsgrad else None,
            master_params=every("master_param") if master else None,
            rounding_seeds=[int(s["rounding_seed"]) for s in states] if stochastic else None,
            exp_avg_absmaxes=every("exp_avg_absmax") if quantized else None,
            exp_avg_sq_absmaxes=every("exp_avg_sq_absmax") if quantized else None,
            shadow_params=[s.copy for s in shadows] if writes else None,
            backend=backend,
        )
        return _Call(self._ids(params), prepared, params, shadows, writes)

    def _shadow(self, params: list[Tensor]) -> list[Shadow]:
        """The shadows of parameters, made at their first step; of float32 alone."""
        dtype = self.shadow_dtype
        if dtype is None or params[0].dtype is not torch.float32:
            return []
        kept: dict[Tensor, Shadow] = self.__dict__.setdefault("_shadows", {})
        for param in params:
            if param not in kept or not kept[param].fits(dtype):
                kept[param] = Shadow(param, dtype)
        return [kept[param] for param in params]

    def _complete(
        self, param: Tensor, group: dict[str, Any], backend: str, amsgrad: bool, master: bool, stochastic: bool
    ) -> None:
        """Makes what the state of a parameter lacks: at its first step, or when state of another kind was loaded."""
        state, dtype, moment = self.state[param], state_dtype(param), self._moment_dtype(param)
        there = group["capturable"] or group["fused"] or backend in ("triton", "cuda")
        step = state.get("step")
        if step is None:
            device = param.device if there else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        elif step.dtype is not torch.float32 or (step.device != param.device and (there or not step.is_cpu)):
            state["step"] = step.to(param.device, torch.float32)
        for key, signed in MOMENTS.items():
            if self._quantized(param, group):
                self._quantize(param, state, key, signed)
            elif f"{key}_codes" in state:
                state[key] = dequantize(state.pop(f"{key}_codes"), state.pop(f"{key}_absmax"), signed=signed)
            elif key not in state:
                state[key] = torch.zeros_like(param, dtype=moment, memory_format=torch.preserve_format)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if master and "master_param" not in state:
            state["master_param"] = param.detach().to(dtype)
        if stochastic and "rounding_seed" not in state:
            state["rounding_seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        for key in EXACT:
            wanted = moment if key in MOMENTS else dtype
            if key in state and state[key].dtype is not wanted:
                state[key] = state[key].to(wanted)

    @staticmethod
    def _quantize(param: Tensor, state: dict[str, Any], key: str, signed: bool) -> None:
        """The moment as codes in the order the parameter lies in now."""
        codes, order = state.get(f"{key}_codes"), memory_order(param)
        if codes is not None and codes.stride() == order:
            return
        wide = torch.empty_strided(param.shape, order, dtype=torch.float32, device=param.device)
        if codes is not None:
            wide.copy_(dequantize(codes, state[f"{key}_absmax"], signed=signed))
        elif key in state:
            wide.copy_(state.pop(key))
        else:
            wide.zero_()
        state[f"{key}_codes"], state[f"{key}_absmax"] = quantize(wide, signed=signed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() of this class or of torch's gave.

        torch casts loaded state to the parameter's dtype; here the moments and master copies of 16-bit parameters keep
        their float32 values.
        """
        final: list[dict[str, Any]] = []

        def look(_: Any, state_dict: dict[str, Any]) -> None:  # runs after the user's hooks
            final.append(state_dict)

        def restore(_: Any) -> None:  # runs before the user's hooks
            ids = [i for group in final[0]["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, param in zip(ids, params, strict=True):
                saved = final[0]["state"].get(i, {})
                for key in EXACT:
                    if key in saved and param.is_floating_point():
                        self.state[param][key] = saved[key].to(device=param.device, dtype=state_dtype(param))
                for key in (f"{moment}_{part}" for moment in MOMENTS for part in ("codes", "absmax")):
                    if key in saved:
                        self.state[param][key] = saved[key].to(param.device)
                if "rounding_seed" in saved:
                    self.state[param]["rounding_seed"] = saved["rounding_seed"].to("cpu", torch.int64)

        hooks = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "master_weights", "stochastic_rounding", "state_bits", "shadow_dtype", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_prepared", None)
        self.__dict__.pop("_shadows", None)


_OWN_ARGUMENTS = """
    Args beyond torch's:
        max_norm: the gradients are scaled to at most this norm over all parameters together, as by
            torch.nn.utils.clip_grad_norm_ before the step, but without writing them; the norm found stands in
            `grad_norm` after the step (inf to have the norm alone). None for neither.
        master_weights: float32 copies ("master_param" in the state) of bfloat16 and float16 parameters are updated, so
            that updates below half an ulp add up. Elements of a parameter changed outside the optimizer count in place
            of the copy's. 4 bytes a parameter.
        stochastic_rounding: bfloat16 and float16 parameters are rounded up or down with probability by nearness: the
            mean moves right without copies. Reproducible: the bits depend on the seed in the state ("rounding_seed",
            drawn from torch's generator at the first step), the step and the element.
        state_bits: 32; 16 for moments of bfloat16 parameters in bfloat16, 4 bytes a parameter in place of 8: as torch
            keeps them, but rounded up or down with probability by nearness, so that the second moment decays; or 8 for
            moments of 8 bits in blocks of 256 elements with a float32 scale each (Dettmers et al. 2021,
            arXiv:2110.02861): 2.03 bytes a parameter. Those are "exp_avg_codes" and "exp_avg_absmax" in the state, and
            so for "exp_avg_sq"; parameters of fewer than 4096 elements and float64 ones keep wide moments; not with
            amsgrad. States of any kind load into an optimizer of another, which converts them at its next step;
            torch.optim's cannot read 8-bit ones.
        shadow_dtype: bfloat16 or float16: the step leaves a copy of every float32 parameter in this dtype beside it,
            for fastlm's layers under torch.autocast, which then cast no weight. 2 bytes a parameter; made at the first
            step, not in the state dict. A parameter changed since by an in-place operation on it (load_state_dict,
            torch.nn.init) or given other memory (`p.data = ...`) is cast as ever until the next step. A write into
            `p.data`, which autograd does not notice either, leaves the copy as it was until then.

    Differences: moments of bfloat16 and float16 parameters are float32 unless state_bits says otherwise (torch keeps
    them in the parameter's dtype);
    state dicts load both ways all the same. `grad_scale` and `found_inf`, set by torch.amp.GradScaler, are honoured;
    p.grad is left as it came, neither unscaled nor clipped. foreach is accepted and chooses nothing here; fused and
    capturable say that "step" lies on the parameter's device, where the GPU backends always keep it. These never
    wait for the GPU: lr may be a tensor there, grad_scale and found_inf are read there, and after one step
    outside, step() can be captured in a CUDA graph (lr must then be a tensor if it shall change between replays).

    Raises:
        UnsupportedError: differentiable=True, or a complex parameter at its first step.
        RuntimeError: a sparse gradient.
"""


class Adam(_Fused):
    __doc__ = (
        """torch.optim.Adam with all parameters updated in one fused call (Kingma and Ba 2014, arXiv:1412.6980).
"""
        + _OWN_ARGUMENTS
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_bits: int = 32,
        shadow_dtype: torch.dtype | None = None,
    ) -> None:
        self._configure(differentiable, max_norm, master_weights, stochastic_rounding, state_bits, shadow_dtype)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip


class AdamW(_Fused, torch.optim.AdamW):
    __doc__ = (
        """torch.optim.AdamW with all parameters updated in one fused call (Loshchilov and Hutter 2017,
    arXiv:1711.05101).
"""
        + _OWN_ARGUMENTS
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_bits: int = 32,
        shadow_dtype: torch.dtype | None = None,
    ) -> None:
        self._configure(differentiable, max_norm, master_weights, stochastic_rounding, state_bits, shadow_dtype)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            fused=fused,
        )  # fmt: skip
