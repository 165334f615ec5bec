"""A training step of transformers' own GPT-2 and Llama, about 100M weights, before and after fastlm.hf.enable.

    python -m bench.bench_hf                                    both models, fp32, bf16 and bf16 weights
    python -m bench.bench_hf --model llama --precision bf16     one of them
    python -m bench.bench_hf --parts                            also each part of enable() alone: what it saves
    python -m bench.bench_hf --model every --length 256         every family of tests/hf/zoo.py, 512 wide, 4 layers
    python -m bench.bench_hf --save                             adds to bench/results/hf-<device>.json

One step: forward with labels, backward, clipping to norm 1, torch.optim.AdamW (fused), the same for all but
"+ AdamW", which has fastlm.optim.AdamW. It is one model in one process, enabled and disabled between the steps, which
take turns; gradients and loss are compared first. bf16 is torch.autocast; "bf16 weights" a model that is bfloat16
throughout. Peak memory is that of a process of its own for each side, less what it held before the model was made.
Stock is attn_implementation="sdpa", transformers' own choice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("gpt2", "llama")
_WIDE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "head_dim": 64,
}  # fmt: skip
_WIDE_ENCODER = {k: v for k, v in _WIDE.items() if k not in ("num_key_value_heads", "head_dim")}
_WIDE_BART = {
    "vocab_size": 8192, "d_model": 512, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "small llama": _WIDE, "qwen3": _WIDE, "mistral": {**_WIDE, "sliding_window": 128},
    "gemma2": {**_WIDE, "query_pre_attn_scalar": 64, "sliding_window": 128},
    "gemma3": {
        **_WIDE, "query_pre_attn_scalar": 64, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": {k: v for k, v in _WIDE.items() if k != "head_dim"},
    "small gpt2": {"vocab_size": 8192, "n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 1024},
    "gpt_neox": _WIDE_ENCODER,
    "opt": {
        "vocab_size": 8192, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 8, "max_position_embeddings": 1024,
    },
    "bert": _WIDE_ENCODER, "roberta": _WIDE_ENCODER, "modernbert": {**_WIDE_ENCODER, "local_attention": 128},
    "t5": {"vocab_size": 8192, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 3, "num_heads": 8},
    "bart": {**_WIDE_BART, "max_position_embeddings": 1024},
    "whisper": {**_WIDE_BART, "num_mel_bins": 80, "max_source_positions": 256, "max_target_positions": 512},
}  # fmt: skip
"""The families of tests/hf/zoo.py, wide enough for kernels to matter."""
PRECISIONS = ("fp32", "bf16", "bf16 weights")
MALLOC = ("default", "tuned")
PARTS = ("attention", "norm", "mlp", "rope", "loss")
STOCK, ENABLED, OPTIMIZER = "stock", "enabled", "enabled + AdamW"

NO_ROPE = ("gpt2", "small gpt2", "opt", "bert", "roberta", "t5", "bart", "whisper")


def build(name: str, precision: str, layers: int | None = None) -> nn.Module:
    """GPT-2's 124 million weights, or a Llama of 12 layers, 768 wide, 12 heads over 4, 111 million."""
    import transformers

    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    if name in FAMILIES:
        from tests.hf import zoo

        made: nn.Module = zoo.build(name.removeprefix("small "), **FAMILIES[name])
        with torch.no_grad():  # the zoo's weights suit 32 channels
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.15)
        return made.train().to(dtype)
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=layers or 12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model: nn.Module = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    else:
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers or 12,
            num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train().to(dtype)


def batch_of(model: nn.Module, name: str, batch: int, length: int) -> dict[str, Any]:
    """Random tokens that are their own labels, and what else the model takes."""
    if name in FAMILIES:
        from tests.hf import zoo

        family = name.removeprefix("small ")
        given = zoo.inputs(family, batch=batch, length=length + (3 if family in zoo.SEQ2SEQ else 0))
        if family == "whisper":
            given["input_features"] = torch.randn(batch, 80, 512)
        return given
    tokens = torch.randint(3, model.config.vocab_size, (batch, length))
    return {"input_ids": tokens, "labels": tokens}


@contextlib.contextmanager
def variant(model: nn.Module, name: str) -> Iterator[None]:
    """The model as that variant has it, for the length of the block."""
    if name == STOCK:
        yield
        return
    from fastlm import hf

    wanted = {part: name in (part, ENABLED, OPTIMIZER) for part in PARTS}
    with contextlib.redirect_stdout(io.StringIO()):
        hf.enable(model, **wanted)
    try:
        yield
    finally:
        hf.disable(model)


def loss_of(model: nn.Module, batch: dict[str, Any], precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(**batch).loss


def agree(model: nn.Module, batch: dict[str, Any], precision: str, names: list[str]) -> None:
    """Refuses to time a wrong result: every gradient is as near to stock's in float32 as stock's own, give or take."""

    def gradients(of: nn.Module, precision: str) -> tuple[float, list[Tensor]]:
        loss = loss_of(of, batch, precision)
        loss.backward()
        found = [p.grad.float() for p in of.parameters() if p.grad is not None]
        of.zero_grad()
        return loss.item(), found

    def errors(found: list[Tensor]) -> list[float]:
        return [
            ((mine - true).norm() / true.norm().clamp_min(least)).item()
            for mine, true in zip(found, truth, strict=True)
        ]

    loss, truth = gradients(copy.deepcopy(model).float(), "fp32")
    least = 1e-3 * max(true.norm() for true in truth)  # the bias of a key has none: what is found there is noise
    own = errors(gradients(model, precision)[1])
    for name in names:
        with variant(model, name):
            mine, found = gradients(model, precision)
        worst = max(error / (1.5 * stock + 1e-3) for error, stock in zip(errors(found), own, strict=True))
        if not (worst < 1 and abs(mine / loss - 1) < (1e-5 if precision == "fp32" else 0.01)):
            raise SystemExit(
                f"bench: {name} is {worst:.2f} times as far from float32 as it may be, its loss {mine:.6f} where "
                f"float32 gives {loss:.6f}; a wrong result is not timed"
            )


def step_of(model: nn.Module, batch: dict[str, Any], precision: str, name: str) -> Callable[[], float]:
    """Seconds of one training step."""
    from fastlm.optim import AdamW

    if name == OPTIMIZER:
        low = torch.bfloat16 if precision == "bf16" else None
        optimizer: torch.optim.Optimizer = AdamW(model.parameters(), 1e-5, max_norm=1.0, shadow_dtype=low)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss_of(model, batch, precision).backward()
        if name != OPTIMIZER:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def worker(options: argparse.Namespace) -> None:
    """Prints one JSON line: medians by variant, or the peak of one variant."""
    import transformers.models.auto.modeling_auto  # noqa: F401  its own memory is nobody's

    import fastlm

    if options.malloc[0] == "tuned" and not fastlm.tune_malloc():
        raise SystemExit("malloc cannot be tuned here: python -m fastlm.info says why")
    precision, names = options.precision[0], options.worker.split(",")
    before = peak()
    model = build(options.model[0], precision, options.layers)
    batch = batch_of(model, options.model[0], options.batch, options.length)
    if len(names) > 1:
        agree(model, batch, precision, names)
    states: dict[str, Callable[[], float]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.warmup + options.steps):
        for name in names if turn % 2 == 0 else reversed(names):
            # the moments of torch's optimizer are one set for all that have it: they are not what differs
            key = name if name == OPTIMIZER else STOCK
            step = states.setdefault(key, step_of(model, batch, precision, name))
            with variant(model, name):
                seconds = step()
            if turn >= options.warmup:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    weights = sum(p.numel() for p in model.parameters())
    print(json.dumps({"seconds": medians, "peak": peak() - before, "weights": weights}))


def peak() -> int:
    """Bytes this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(options: argparse.Namespace, model: str, precision: str, malloc: str, names: list[str], steps: int) -> Any:
    command = [
        sys.executable, "-m", "bench.bench_hf", "--worker", ",".join(names), "--model", model, "--precision",
        precision, "--malloc", malloc, "--batch", str(options.batch), "--length", str(options.length), "--steps",
        str(steps), "--warmup", str(options.warmup if steps else 2),
    ]  # fmt: skip
    command += [] if options.layers is None else ["--layers", str(options.layers)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=offline)
    if done.returncode:
        raise SystemExit(f"bench: {model} {precision} {malloc} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_hf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=(*MODELS, *FAMILIES, "every"), action="append", help="default: gpt2, llama")
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--malloc", choices=MALLOC, action="append", help="of both sides (default: each in turn)")
    parser.add_argument("--parts", action="store_true", help="also every part of enable() alone")
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    print(f"{options.batch} x {options.length} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = Results() if options.save else None
    chosen = options.model or MODELS
    for model in FAMILIES if "every" in chosen else chosen:
        names = [STOCK, ENABLED, OPTIMIZER]
        if options.parts:
            names += [part for part in PARTS if part != "rope" or model not in NO_ROPE]
        for precision in options.precision or PRECISIONS:
            for malloc in options.malloc or MALLOC:
                result = run(options, model, precision, malloc, names, options.steps)
                peaks = {n: run(options, model, precision, malloc, [n], 0)["peak"] for n in (STOCK, ENABLED)}
                row = {
                    "model": model, "weights": result["weights"], "precision": precision, "malloc": malloc,
                    "batch": options.batch, "length": options.length, "seconds": result["seconds"], "peak": peaks,
                }  # fmt: skip
                show(row)
                if results is not None:
                    results.add(row)


def show(row: dict[str, Any]) -> None:
    seconds, peaks = row["seconds"], row["peak"]
    print(
        f"{row['model']} {row['precision']}, malloc {row['malloc']}: stock {seconds[STOCK] * 1e3:.0f} ms, enabled "
        f"{seconds[ENABLED] * 1e3:.0f} ms, {seconds[STOCK] / seconds[ENABLED]:.2f}x; with fastlm.optim.AdamW "
        f"{seconds[STOCK] / seconds[OPTIMIZER]:.2f}x; peak {peaks[STOCK] / 1e6:.0f} -> {peaks[ENABLED] / 1e6:.0f} MB, "
        f"{1 - peaks[ENABLED] / peaks[STOCK]:.0%} lower",
        flush=True,
    )
    for part in PARTS:
        if part in seconds:
            print(f"    {part:<10} alone saves {(seconds[STOCK] - seconds[part]) * 1e3:6.0f} ms", flush=True)


class Results:
    """bench/results/hf-<device>.json; a row measured again replaces the one before."""

    def __init__(self) -> None:
        import transformers

        from bench.cpu.results import commit, path_for
        from fastlm import native
        from fastlm.info import cpu_model

        self.path = path_for(cpu_model(), "hf")
        self.data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        self.data |= {"device": cpu_model(), "threads": torch.get_num_threads(), "isa": native.isa()}
        self.about = {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": commit(),
        }  # fmt: skip

    def add(self, row: dict[str, Any]) -> None:
        def key(row: dict[str, Any]) -> list[Any]:
            return [row[name] for name in ("model", "precision", "malloc", "batch", "length")]

        kept = [other for other in self.data["rows"] if key(other) != key(row)]
        self.data["rows"] = sorted([*kept, {**row, **self.about}], key=key)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def markdown(data: dict[str, Any]) -> Iterator[str]:
    """The table of a results file."""
    rows = data["rows"]

    def of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    yield (
        f"{data['device']}, {data['threads']} threads, {data['isa']}; torch {of('torch')}, transformers "
        f"{of('transformers')}, Python {of('python')}; commit {of('commit')}."
    )
    yield ""
    yield (
        "| model | tokens | precision | malloc | stock | enabled | × stock | with fastlm.optim.AdamW | peak memory | "
        "what each part alone saves |"
    )
    yield "|---|--:|---|---|--:|--:|--:|--:|--:|---|"
    for row in rows:
        seconds, peaks = row["seconds"], row["peak"]
        parts = [f"{part} {(seconds[STOCK] - seconds[part]) * 1e3:.0f} ms" for part in PARTS if part in seconds]
        yield (
            f"| {row['model']}, {row['weights'] / 1e6:.0f}M | {row['batch']} × {row['length']} | {row['precision']} | "
            f"{row['malloc']} | {seconds[STOCK] * 1e3:.0f} ms | {seconds[ENABLED] * 1e3:.0f} ms | "
            f"{seconds[STOCK] / seconds[ENABLED]:.2f}× | {seconds[STOCK] / seconds[OPTIMIZER]:.2f}× | "
            f"{peaks[STOCK] / 1e9:.2f} → {peaks[ENABLED] / 1e9:.2f} GB, −{1 - peaks[ENABLED] / peaks[STOCK]:.0%} | "
            f"{', '.join(parts)} |"
        )


if __name__ == "__main__":
    main()
