"""What is measured on a CPU, the most important of each op first, and the least that is promised: the one place for it.

An item is a line of the table. Its targets say how many times fastlm's time (or memory) a peer takes at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import (
    bench_adam,
    bench_attention,
    bench_cross_entropy,
    bench_gelu,
    bench_glu,
    bench_layer_norm,
    bench_linear_cross_entropy,
    bench_rms_norm,
    bench_rope,
)
from bench.harness import Case, dtype_name
from bench.peers import peers
from fastlm import optim

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Target:
    peer: str
    malloc: str
    """Of the peer: "default" or "tuned"."""
    least: float


@dataclass(frozen=True)
class Item:
    op: str
    shape: str
    dtype: str
    kind: str
    """ "op" (seconds of a case), "memory" (bytes), "step" (seconds of a training step), "run" (seconds of the
    steps of a training run to the same validation loss)."""
    targets: tuple[Target, ...] = ()
    case: Case | None = None
    model: Mapping[str, Any] | None = None
    """Of "step": the options of bench.bench_train."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.dtype

    @property
    def name(self) -> str:
        return " ".join(self.key)

    @property
    def mallocs(self) -> tuple[str, ...]:
        """Under which settings it is measured. Small tensors come from the heap in both."""
        if self.kind != "op":
            return ("",)
        return ("default", "tuned") if self.targets else ("tuned",)

    @property
    def suite(self) -> str:
        """The op whose tests must pass before this is timed, or "" where the run itself compares losses."""
        op = self.op.removeprefix("add_").removesuffix(" in place").removesuffix(" memory").removesuffix(" 8-bit")
        return {"swiglu": "glu", "geglu": "glu", "gelu tanh": "gelu"}.get(op, op) if self.case else ""


def tuned(eager: float | None = None, compiled: float | None = None, peer: str = "eager") -> tuple[Target, ...]:
    """Targets with malloc tuned on both sides."""
    pairs = ((peer, eager), ("compile", compiled))
    return tuple(Target(name, "tuned", least) for name, least in pairs if least is not None)


def of(cases: Iterator[Case], promised: Mapping[tuple[str, torch.dtype], tuple[Target, ...]]) -> Iterator[Item]:
    """Items of the cases that are promised something; torch.compile is left out where nothing is said of it."""
    for case in cases:
        targets = promised.get((case.op, case.dtype))
        if targets is not None:
            named = {target.peer for target in targets}
            kept = {name: f for name, f in case.functions.items() if name != "compile" or name in named}
            yield Item(case.op, case.shape, dtype_name(case.dtype), "op", targets, replace(case, functions=kept))


def both(op: str, wide: tuple[Target, ...], half: tuple[Target, ...]) -> dict[tuple[str, torch.dtype], tuple]:
    return {(op, F32): wide, (op, BF16): half}


def losses() -> Iterator[Item]:
    yield from of(
        bench_cross_entropy.in_place_cases([(2048, 50304)]),
        both("cross_entropy in place", tuned(4, 3.5), tuned(3, 2.5)),
    )
    heads = bench_linear_cross_entropy.cases([(2048, 768, 50304)])
    promised = (*tuned(1.1, 1.05), *tuned(1.1, peer="torch chunked"))
    if "torch chunked" not in peers("linear_cross_entropy"):
        promised = promised[:2]
    eager = {"compile": bench_linear_cross_entropy.eager}
    cases = (replace(c, functions=c.functions | eager | peers("linear_cross_entropy")) for c in heads)
    yield from of(cases, both("linear_cross_entropy", promised, promised))
    for dtype, least in ((F32, 4.0), (BF16, 8.0)):
        targets = [Target("eager", "default", least), Target("compile", "default", 2.5)]
        if len(promised) > 2:
            targets.append(Target("torch chunked", "default", 1.0))
        yield Item("linear_cross_entropy memory", "2048x768x50304", dtype_name(dtype), "memory", tuple(targets))


def attention() -> Iterator[Item]:
    sizes = {(4, 12, 1024, 64): 3.5, (1, 8, 4096, 64): 3.0, (1, 8, 2048, 128): 2.5}
    for size, half in sizes.items():
        promised = both("attention", tuned(1.4, peer="sdpa"), tuned(half, peer="sdpa"))
        yield from of(bench_attention.cases([size]), promised)


def norms() -> Iterator[Item]:
    size = [(8192, 1024)]
    rms = [both(op, tuned(4, 1.9), tuned(7, 2.5)) for op in ("rms_norm", "add_rms_norm")]
    yield from of(bench_rms_norm.cases(size), rms[0] | rms[1])
    plain, added = (
        both("layer_norm", tuned(1.1, 1.8), tuned(1.5, 1.8)),
        both("add_layer_norm", tuned(1.7, 1.8), tuned(3, 1.8)),
    )
    yield from of(bench_layer_norm.cases(size), plain | added)


def elementwise() -> Iterator[Item]:
    yield from of(bench_glu.cases([(4096, 3072)]), both("swiglu", tuned(2.5, 1.3), tuned(2.5, 1.3)))
    yield from of(bench_rope.cases([(4, 1024, 24, 64)]), both("rope", tuned(8, 4), tuned(8, 4)))
    yield from of(bench_gelu.cases([(4096, 3072)]), both("gelu", tuned(1.2, 1.7), tuned(1.2, 1.7)))


def eight_bit_step(params: list[torch.nn.Parameter], clip: bool) -> Callable[[], Any]:
    return optim.AdamW(params, 1e-4, state_bits=8).step


def adam() -> Iterator[Item]:
    cases = list(bench_adam.cases({"124M in 100": bench_adam.SHAPES["124M in 100"]}))
    yield from of(iter(cases), both("adam", tuned(1.1, peer="torch fused"), tuned(2, peer="torch fused")))
    wide = next(c for c in cases if c.dtype is F32)
    # 8-bit moments move 2 bytes an element each way in place of 8, and are not what torch's are: no comparison.
    eight = replace(
        wide, op="adam 8-bit", bytes=wide.bytes * 16 / 28, tolerance=None,
        functions={**wide.functions, "fastlm": eight_bit_step},
    )  # fmt: skip
    yield from of(iter([eight]), {("adam 8-bit", F32): tuned(1.25, peer="torch fused")})


def small() -> Iterator[Item]:
    """Shapes of a small model, where calls cost more than work: nothing is promised, all is shown."""
    suites: list[tuple[Any, Sequence[Any] | Mapping[str, Any]]] = [
        (bench_cross_entropy, [(768, 65)]),
        (bench_linear_cross_entropy, [(768, 128, 65)]),
        (bench_attention, [(12, 4, 64, 32)]),
        (bench_rms_norm, [(768, 128)]),
        (bench_layer_norm, [(768, 128)]),
        (bench_glu, [(768, 384)]),
        (bench_rope, [(8, 64, 4, 32)]),
        (bench_gelu, [(768, 512)]),
        (bench_adam, {"small GPT": bench_adam.GPT}),
    ]
    for suite, sizes in suites:
        found = [case for case in suite.cases(sizes) if not case.op.endswith(" forward")]
        yield from of(iter(found), {(case.op, case.dtype): () for case in found})


RUN_STEPS = 500
"""Of nanoGPT's 2000: a quarter of its schedule, to a validation loss that is the same for all."""
GPT = {"style": "gpt2", "layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 8, "dropout": 0.0}
GPT2 = {"style": "gpt2", "layers": 12, "width": 768, "heads": 12, "context": 512, "batch": 2, "dropout": 0.0}


def steps() -> Iterator[Item]:
    def step(shape: str, model: Mapping[str, Any], default: float, tuned: float | None, compiled: float) -> Item:
        targets = [Target("plain", "default", default), Target("plain compiled", "tuned", compiled)]
        if tuned is not None:
            targets.insert(1, Target("plain", "tuned", tuned))
        return Item("training step", shape, "bfloat16", "step", tuple(targets), model=model)

    yield step("6 layers, 384 wide, V=65", GPT | {"vocab": 65}, 2.2, None, 2.0)
    yield step("6 layers, 384 wide, V=50304", GPT | {"vocab": 50304}, 2.2, 1.4, 1.4)
    yield step("GPT-2 124M, T=512", GPT2 | {"vocab": 50304}, 1.8, 1.4, 1.3)
    for dtype, plain in (("float32", 2.0), ("bfloat16", 2.5)):
        targets = (Target("plain", "tuned", plain), Target("plain compiled", "tuned", 1.5))
        yield Item("training run", f"nanoGPT's for a CPU, {RUN_STEPS} steps", dtype, "run", targets)


def items() -> list[Item]:
    groups: list[Callable[[], Iterator[Item]]] = [attention, losses, norms, elementwise, adam, small, steps]
    return [item for group in groups for item in group()]


def select(words: Sequence[str]) -> list[Item]:
    """Items whose name has all the words of one of the arguments, or all items for none.

    Raises ValueError for an argument that finds nothing.
    """
    every = items()
    chosen: list[Item] = []
    for argument in words:
        found = [item for item in every if all(word in item.name for word in argument.split())]
        if not found:
            raise ValueError(
                f"nothing is called {argument!r}; there is {', '.join(dict.fromkeys(i.op for i in every))}"
            )
        chosen += found
    return [item for item in every if item in chosen] if words else every
