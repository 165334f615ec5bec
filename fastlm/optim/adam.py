"""Adam and AdamW: torch.optim's own classes, with a step that updates all parameters in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlm._dispatch import UnsupportedError
from fastlm.ops.adam import Prepared, grad_norm, state_dtype

LOW = (torch.bfloat16, torch.float16)
EXACT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")  # state that stays float32 for 16-bit parameters


class _Fused(torch.optim.Adam):
    """The step, the state and the loading that Adam and AdamW share; the rest is torch's."""

    max_norm: float | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    grad_norm: Tensor | None = None
    """Norm of all gradients at the last step, before clipping and after unscaling, 0-d; None without max_norm."""
    _step_supports_amp_scaling = True  # GradScaler hands grad_scale and found_inf to step() in place of its own pass

    def _configure(
        self, differentiable: bool, max_norm: float | None, master_weights: bool, stochastic_rounding: bool
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
        for group, prepared, grads in calls:
            beta1, beta2 = group["betas"]
            prepared.step(
                grads, lr=float(group["lr"]), betas=(float(beta1), float(beta2)), eps=group["eps"],
                weight_decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"],
                maximize=group["maximize"], grad_scale=scale, found_inf=found_inf,
            )  # fmt: skip

    def _collect(self) -> list[tuple[dict[str, Any], Prepared, list[Tensor]]]:
        """The calls of this step: one for each group, dtype and device. Raises before anything is written."""
        cache: dict[Any, tuple[list[int], Prepared]] = self.__dict__.setdefault("_prepared", {})
        calls = []
        for index, group in enumerate(self.param_groups):
            kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                params, grads = kinds.setdefault((param.dtype, param.device), ([], []))
                params.append(param)
                grads.append(grad)
            for kind, (params, grads) in kinds.items():
                key = (index, *kind, group["amsgrad"])
                ids = self._ids(params)
                found = cache.get(key)
                if found is None or found[0] != ids or not found[1].current():
                    prepared = self._prepare(params, group)
                    found = cache[key] = (self._ids(params), prepared)
                calls.append((group, found[1], grads))
        return calls

    def _ids(self, params: list[Tensor]) -> list[int]:
        """Which objects hold the parameters and their state: safe to compare, because the cache keeps them alive."""
        ids, state = [], self.state
        for param in params:
            ids.append(id(param))
            ids.extend(map(id, state[param].values()))
        return ids

    def _prepare(self, params: list[Tensor], group: dict[str, Any]) -> Prepared:
        amsgrad, low = group["amsgrad"], params[0].dtype in LOW
        master, stochastic = self.master_weights and low, self.stochastic_rounding and low
        for param in params:
            self._complete(param, group, amsgrad, master, stochastic)
        states = [self.state[p] for p in params]
        return Prepared(
            params,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            max_exp_avg_sqs=[s["max_exp_avg_sq"] for s in states] if amsgrad else None,
            master_params=[s["master_param"] for s in states] if master else None,
            rounding_seeds=[int(s["rounding_seed"]) for s in states] if stochastic else None,
        )

    def _complete(self, param: Tensor, group: dict[str, Any], amsgrad: bool, master: bool, stochastic: bool) -> None:
        """Makes what the state of a parameter lacks: at its first step, or when torch's state was loaded."""
        if not param.is_floating_point():
            raise UnsupportedError(
                f"fastlm.optim.{type(self).__name__} takes real floating point parameters, got {param.dtype}; "
                f"torch.optim.{type(self).__name__} takes complex ones"
            )
        state, dtype = self.state[param], state_dtype(param)
        if "step" not in state:
            device = param.device if group["capturable"] or group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        elif state["step"].dtype is not torch.float32:
            state["step"] = state["step"].to(torch.float32)
        for key in EXACT[: 3 if amsgrad else 2]:
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if master and "master_param" not in state:
            state["master_param"] = param.detach().to(dtype)
        if stochastic and "rounding_seed" not in state:
            state["rounding_seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64)
        for key in EXACT:
            if key in state and state[key].dtype is not dtype:
                state[key] = state[key].to(dtype)

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
        own = ("max_norm", "master_weights", "stochastic_rounding", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_prepared", None)


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

    Differences: moments of bfloat16 and float16 parameters are float32 (torch keeps them in the parameter's dtype);
    state dicts load both ways all the same. `grad_scale` and `found_inf`, set by torch.amp.GradScaler, are honoured;
    p.grad is left as it came, neither unscaled nor clipped. foreach, fused and capturable are accepted and choose
    nothing here.

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
    ) -> None:
        self._configure(differentiable, max_norm, master_weights, stochastic_rounding)
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
    ) -> None:
        self._configure(differentiable, max_norm, master_weights, stochastic_rounding)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            fused=fused,
        )  # fmt: skip
