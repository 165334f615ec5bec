"""Settings of a run, as the command line shows them, and presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fastlm.models import CausalLMConfig


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    out: Path = Path("runs/train")
    """Folder of the run: checkpoints, logs, plot, tokens."""
    steps: int | None = 2000
    """Optimizer steps in all. None: until --minutes are over."""
    minutes: float | None = None
    """Minutes in all, evaluation included. Whichever of --steps and --minutes is reached first ends the run."""
    batch: int = 12
    """Windows of text, or texts, per pass through the model."""
    accumulate: int = 1
    """Passes per optimizer step. Their gradients add up as if they were one large batch."""
    lr: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the end."""
    warmup: int = 100
    """Steps in which the learning rate rises to --lr."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls. wsd: it stays at --lr and falls at the end."""
    decay: float = 0.2
    """Share of the run in which wsd falls."""
    weight_decay: float = 0.1
    """Decay of matrices. Biases and norms have none."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.99
    """AdamW's memory of its square."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters. 0: no limit."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products. auto: bf16 on a GPU or a CPU with AMX, else fp32. Weights stay in fp32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: the GPU if there is one."""
    threads: int = 0
    """CPU threads. 0: as many as PyTorch chooses."""
    malloc: bool = True
    """Keep freed memory instead of returning it to the system: faster steps, more memory held."""
    seed: int = 1337
    """Of the weights, the order of the data and dropout. The same seed gives the same run."""
    eval_every: int = 250
    """Steps between two evaluations. 0: only at the end."""
    eval_batches: int = 0
    """Batches per evaluation. 0: the whole validation text, which is also used at the end in any case."""
    save_every: int = 500
    """Steps between two checkpoints. 0: only at the end and when interrupted."""
    log_every: int = 10
    """Steps between two lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard events."""

    def __post_init__(self) -> None:  # raises ValueError on what cannot be
        object.__setattr__(self, "out", Path(self.out))
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are both None: the run would never end; give one of them")
        for name, low in (
            ("batch", 1), ("accumulate", 1), ("log_every", 1), ("warmup", 0), ("threads", 0), ("seed", 0),
            ("eval_every", 0), ("eval_batches", 0), ("save_every", 0),
        ):  # fmt: skip
            _at_least(name, getattr(self, name), low)
        if self.steps is not None:
            _at_least("steps", self.steps, 0)
        for name in ("lr", "min_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes must be finite and above 0, got {self.minutes}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")
        _one_of("schedule", self.schedule, ("cosine", "linear", "wsd", "constant"))
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))


def _at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class ModelOptions:
    """Shape of the model; the vocabulary comes from the text."""

    style: Literal["gpt2", "llama"] = "llama"
    """Of lm. gpt2: learned positions, LayerNorm, GELU. llama: rotary positions, RMSNorm, SwiGLU."""
    layers: int = 4
    """Transformer blocks; of seq2seq those of the encoder."""
    decoder_layers: int | None = None
    """Of seq2seq: blocks of the decoder. None: as many as --layers."""
    heads: int = 4
    """Attention heads. They divide --width."""
    kv_heads: int | None = None
    """Of lm: heads of keys and values. None: as many as --heads."""
    width: int = 128
    """Numbers per token between blocks."""
    context: int = 64
    """Tokens the model sees at once. What is longer is cut."""
    dropout: float = 0.0
    """Share of activations dropped in training."""

    def config(self, vocab_size: int) -> CausalLMConfig:
        """The model's config for a vocabulary; input and output embeddings are shared and there are no biases."""
        make = CausalLMConfig.gpt2 if self.style == "gpt2" else CausalLMConfig.llama
        more = {"activation": "gelu"} if self.style == "gpt2" else {}
        return make(
            vocab_size=vocab_size, context=self.context, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads,
            width=self.width, dropout=self.dropout, bias=False, tied=True, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class TextOptions:
    """How text becomes tokens."""

    tokenizer: Literal["bpe", "word", "char", "byte"] = "bpe"
    """bpe: byte-level byte-pair encoding learned from the text. word: one token per word, a common one for the rare.
    char: one per character. byte: one per byte."""
    vocab: int = 4096
    """Tokens that bpe learns, words that word keeps."""


@dataclass(frozen=True)
class InitOptions:
    """What the weights start from, if not from chance."""

    init: Path | None = None
    """Run, checkpoint or folder of transformers to start from: its weights, shape and tokenizer. A head of another task
    or for other labels starts anew."""
    vectors: Path | None = None
    """Word vectors for the embedding, of GloVe or word2vec, text or binary; with --tokenizer word."""
    freeze_vectors: bool = False
    """Leave the embedding as it starts."""

    def __post_init__(self) -> None:
        for name in ("init", "vectors"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.init and self.vectors:
            raise ValueError("init and vectors exclude each other: the embedding comes from one of them")
        if self.freeze_vectors and not self.vectors:
            raise ValueError("freeze_vectors needs vectors")


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but its text."""

    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    task: str = "lm"
    init: InitOptions = field(default_factory=InitOptions)


def default() -> Recipe:
    """A small Llama-style model on any text."""
    return Recipe()


def demo() -> Recipe:
    """What `fastlm demo` trains: sized for two minutes on two CPU cores."""
    return Recipe(
        model=ModelOptions(style="llama", layers=4, heads=4, width=256, context=128),
        train=TrainConfig(
            out=Path("runs/demo"),
            steps=None,
            minutes=2.0,
            batch=8,
            lr=3e-3,
            min_lr=1e-4,
            warmup=50,
            schedule="linear",
            weight_decay=0.1,
            beta2=0.98,
            eval_every=100,
            eval_batches=6,
            save_every=200,
        ),
    )


def shakespeare_char_cpu() -> Recipe:
    """nanoGPT's published settings for a CPU: characters of tinyshakespeare, 0.8 million weights, 2000 steps."""
    return Recipe(
        text=TextOptions(tokenizer="char"),
        model=ModelOptions(style="gpt2", layers=4, heads=4, width=128, context=64, dropout=0.0),
        train=TrainConfig(
            out=Path("runs/shakespeare"),
            steps=2000,
            batch=12,
            lr=1e-3,
            min_lr=1e-4,
            warmup=100,
            schedule="cosine",
            weight_decay=0.1,
            beta2=0.99,
            clip=1.0,
            precision="fp32",
            eval_every=500,
            eval_batches=20,
            save_every=1000,
        ),
    )


def mlm() -> Recipe:
    """Masked words of plain text, sized for two minutes on two CPU cores: small, or it would not get to see enough."""
    return Recipe(
        text=TextOptions(vocab=1024),
        model=ModelOptions(layers=2, heads=4, width=128, context=64),
        train=TrainConfig(
            out=Path("runs/mlm"),
            steps=2500,
            batch=32,
            lr=2e-3,
            warmup=200,
            schedule="linear",
            weight_decay=0.05,
            beta2=0.98,
            eval_every=250,
            eval_batches=8,
        ),
        task="mlm",
    )


def classify() -> Recipe:
    """Labelled texts, some thousand of them, sized for a minute on two CPU cores; longer would only overfit."""
    return Recipe(
        text=TextOptions(tokenizer="word", vocab=8192),
        model=ModelOptions(layers=2, heads=4, width=128, context=64, dropout=0.2),
        train=TrainConfig(
            out=Path("runs/classify"),
            steps=500,
            batch=32,
            lr=5e-4,
            min_lr=0.0,
            warmup=100,
            schedule="linear",
            beta2=0.98,
            eval_every=100,
        ),
        task="classify",
    )


def tag() -> Recipe:
    """Tagged words, sized for two minutes on two CPU cores."""
    return replace(
        classify(),
        model=ModelOptions(layers=2, heads=4, width=128, context=128, dropout=0.1),
        train=replace(classify().train, out=Path("runs/tag"), steps=1000, lr=1e-3, batch=16),
        task="tag",
    )


def seq2seq() -> Recipe:
    """Parallel text, some ten thousand sentences, sized for five minutes on two CPU cores."""
    return Recipe(
        text=TextOptions(vocab=2048),
        model=ModelOptions(layers=2, heads=4, width=128, context=64, dropout=0.1),
        train=TrainConfig(
            out=Path("runs/seq2seq"),
            steps=2000,
            batch=64,
            lr=2e-3,
            min_lr=0.0,
            warmup=100,
            schedule="linear",
            weight_decay=0.01,
            beta2=0.98,
            eval_every=250,
            eval_batches=4,
        ),
        task="seq2seq",
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "demo": demo,
    "shakespeare-char-cpu": shakespeare_char_cpu,
    "mlm": mlm,
    "classify": classify,
    "tag": tag,
    "seq2seq": seq2seq,
}
"""By name; that of a task is where `--task` starts."""
