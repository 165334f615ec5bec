"""What transformers.Trainer takes from fastlm: the optimizer, and a callback that measures the throughput."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlm.optim import AdamW


def optimizer(args: TrainingArguments, **options: Any) -> tuple[type[AdamW], dict[str, Any]]:
    """fastlm.optim.AdamW for Trainer(optimizer_cls_and_kwargs=...), with the rate, betas and eps of the arguments.

    The Trainer makes the groups with and without weight decay, the schedule and the clipping, as for its own AdamW.

    Args:
        options: AdamW's other arguments, such as state_bits=16, or stochastic_rounding=True for bfloat16 parameters.
    """
    own = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return AdamW, {**own, **options}


class ThroughputCallback(TrainerCallback):
    """Prints tokens per second and MFU with the training loss, and puts both into the Trainer's log history.

    Tokens are all positions that the model computes, padding too; of an encoder-decoder, those of the labels. Time is
    that of training with its data loading, without evaluation and checkpoints. MFU is the model FLOPs a second over
    the peak; a token of a sequence of length T takes

        6 N + 12 L C T,  4 for 6 where a weight is frozen

    for N weights in matrix products (the head's too, tied or not; the embedding's are looked up) and L layers of
    attention of width C, counted as if it were not causal (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    Recomputation under gradient checkpointing does not count. An encoder-decoder, whose weights see different numbers
    of tokens, gets no MFU. Of a mixture of experts all experts count.

    Args:
        peak: FLOP/s of one device; None: the rate of a matrix product in the training's dtype, measured when the
            training starts in about a second.

    Raises:
        ValueError: peak is not above 0.
    """

    def __init__(self, peak: float | None = None) -> None:
        if peak is not None and not peak > 0:
            raise ValueError(f"peak must be above 0 FLOP/s, or None to measure it, got {peak}")
        self._given = peak

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        config = model.config.get_text_config()
        self._linear, self._attention = 0, 0
        if not model.config.is_encoder_decoder:
            self._linear, self._attention = _flops_per_token(model), _flops_per_pair(config)
        self._peak = self._given or _measured_peak(args.device, _product_dtype(args, model))
        self._tokens, self._flops = 0, 0
        self._hook = model.register_forward_pre_hook(torch.compiler.disable(self._count), with_kwargs=True)
        self._start = self._stop = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        names = ("labels", "input_ids", "inputs_embeds") if not self._linear else ("input_ids", "inputs_embeds")
        tokens = next((kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)), None)
        if tokens is not None:
            rows, length = tokens.shape[:2]
            self._tokens += rows * length
            self._flops += rows * length * (self._linear + self._attention * length)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The time since the end of the step was not training."""
        now = time.perf_counter()
        self._start += now - max(self._stop, self._start)
        self._stop = now

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._tokens:
            return
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        measured = {"tokens_per_second": self._tokens * args.world_size / seconds}
        line = f"step {state.global_step}: {measured['tokens_per_second']:,.0f} tokens/s"
        if self._flops:
            measured["mfu"] = self._flops / seconds / self._peak
            line += f", {100 * measured['mfu']:.1f} % of {self._peak / 1e12:.3g} TFLOP/s"
        self._tokens, self._flops = 0, 0
        logs.update(measured)
        state.log_history[-1].update(measured)
        if state.is_world_process_zero:
            print(line)


def _flops_per_token(model: Any) -> int:
    """Of forward and backward, without attention: 6 per weight of a matrix product, 4 where it is frozen."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    weights = {id(p): p for p in model.parameters() if p.dim() > 1 and id(p) not in looked_up}
    if head is not None:
        weights |= {id(p): p for p in head.parameters() if p.dim() > 1}
    return sum((6 if p.requires_grad else 4) * p.numel() for p in weights.values())


def _flops_per_pair(config: Any) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(12 * config.num_hidden_layers * config.num_attention_heads * width)


def _product_dtype(args: TrainingArguments, model: Any) -> torch.dtype:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else model.dtype


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product, the best of some that take about a second together."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones((size, size), dtype=dtype, device=device) for _ in "ab")
    best, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
