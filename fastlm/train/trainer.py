"""The loop: forward, backward, update, evaluate, save; stopped by a count, a clock or a signal, resumed exactly."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fastlm
from fastlm import native
from fastlm.optim import AdamW
from fastlm.train import randomness
from fastlm.train.checkpoint import read_checkpoint, read_state, save_checkpoint
from fastlm.train.config import TrainConfig
from fastlm.train.log import RunLog
from fastlm.train.report import Progress, Reporter
from fastlm.train.schedule import learning_rate
from fastlm.train.tasks import Data, Model, count_targets, count_tokens, find_task

Stopped = Literal["finished", "interrupted", "terminated"]


class _StopAskedError(Exception):
    """A signal came during an evaluation."""


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient is infinite or not a number; nothing was saved since."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        stopped: "finished", "interrupted" (Ctrl-C) or "terminated" (SIGTERM).
        steps, seconds: in all, earlier parts of a resumed run included.
        figures: over the whole validation data: "loss" and whatever else the task is judged by, such as "perplexity"
            and "bits_per_byte" or "accuracy"; empty unless finished.
        checkpoint: folder to resume from.
    """

    stopped: Stopped
    steps: int
    seconds: float
    figures: dict[str, float]
    checkpoint: Path

    @property
    def validation_loss(self) -> float:
        """Nats per target; NaN unless finished."""
        return self.figures.get("loss", math.nan)


class Trainer:
    """Trains a model of any family on its dataset.

    >>> trainer = Trainer(CausalLM(recipe.model.config(data.tokenizer.vocab_size)), data, recipe.train)
    >>> result = trainer.fit()

    A run is a function of its seed: the same config gives the same weights bit for bit on the same machine in fp32,
    also when it was killed and resumed from last/, unless the clock (config.minutes) takes part in it.

    Args:
        model: moved to the device of the config. Its class and head say what the task is (fastlm.train.tasks).
        data: its tokenizer's vocabulary must be the model's.
        config: see TrainConfig.
        reporter: is told of the progress; by default nothing is printed.

    Raises:
        ValueError: model and data do not fit together, or the text is shorter than the context.
    """

    def __init__(self, model: Model, data: Data, config: TrainConfig, reporter: Reporter | None = None) -> None:
        vocab = data.tokenizer.vocab_size
        if model.config.vocab_size != vocab:
            raise ValueError(f"model has vocab_size {model.config.vocab_size}, its data in {data.folder} has {vocab}")
        context = model.config.context
        self.device = pick_device(config.device)
        self.task = find_task(model)
        self.batches = data.train_batches(config.batch, config.seed, context)
        # Evaluation has no optimizer state and no graph to hold, so small batches would only waste time.
        self.validation = data.validation_batches(max(config.batch, 4096 // context), context)
        if config.malloc:
            fastlm.tune_malloc()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.data, self.reporter = config, data, reporter or Reporter()
        self.model = model.to(self.device)
        low = torch.bfloat16 if is_bf16(config, self.device) else None
        self.optimizer = make_optimizer(self.model, config, low)
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=low is not None)
        self.step = 0
        self.best: float | None = None
        self.seconds = 0.0
        self._started: float | None = None
        self._speed = self._pace = 0.0  # tokens per second, seconds per step; averaged over about ten steps
        self._asked: Stopped | None = None
        self._unchecked: list[tuple[int, float, Tensor]] = []

    # -- resuming ----------------------------------------------------------------------------------------------------

    def resume(self, folder: str | Path | None = None) -> None:
        """Continue from a checkpoint: weights, optimizer, step, position in the data, every generator.

        Everything is read and compared before anything is changed.

        Args:
            folder: a checkpoint; None for last/ of config.out.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or belongs to another model, tokenizer or text.
        """
        folder = self.config.out / "last" if folder is None else Path(folder)
        meta = read_checkpoint(folder)
        if "train" not in meta or "tokenizer" not in meta:
            raise ValueError(f"{folder} was not saved by a trainer")
        saved = type(self.model).load(folder)
        mine, theirs = asdict(self.model.config), asdict(saved.config)
        differing = [
            f"{name} is {theirs[name]!r} there, {mine[name]!r} here" for name in mine if mine[name] != theirs[name]
        ]
        if differing:
            raise ValueError(f"checkpoint {folder} is of another model: {'; '.join(differing)}")
        if meta["tokenizer"] != self.data.tokenizer.fingerprint:
            raise ValueError(
                f"checkpoint {folder} was trained with tokenizer {meta['tokenizer']}, the data in {self.data.folder} "
                f"has {self.data.tokenizer.fingerprint}"
            )
        if meta["data"] != self.data.info["sha256"]:
            raise ValueError(
                f"checkpoint {folder} was trained on text {meta['data'][:12]}, the data in {self.data.folder} is "
                f"{self.data.info['sha256'][:12]}"
            )
        state = read_state(folder)
        if set(state) != {"optimizer", "random"}:
            raise ValueError(f"{folder} holds the states {sorted(state)}, not optimizer and random")
        self.optimizer.load_state_dict(state["optimizer"])  # raises before it changes anything
        for group in self.optimizer.param_groups:  # settings given anew count, not those of the checkpoint
            group["betas"] = (self.config.beta1, self.config.beta2)
            group["weight_decay"] = self.config.weight_decay if group["decays"] else 0.0
        self.model.load_state_dict(saved.state_dict())
        randomness.set_state(state["random"])
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.best = meta["best"]

    def save(self, name: str) -> Path:
        """Write the checkpoint config.out/name: "last" with everything to resume, "best" the model alone."""
        folder = self.config.out / name
        state = None
        if name == "last":
            state = {"optimizer": self.optimizer.state_dict(), "random": randomness.get_state()}
        meta = {
            "step": self.step,
            "seconds": self._elapsed(),
            "best": self.best,
            "task": self.task.name,
            "labels": list(getattr(self.data, "labels", ())),
            "tokenizer": self.data.tokenizer.fingerprint,
            "data": self.data.info["sha256"],
            "fastlm": fastlm.__version__,
            "torch": torch.__version__,
            "train": {f.name: _plain(getattr(self.config, f.name)) for f in fields(self.config)},
        }
        save_checkpoint(folder, self.model, self.data.tokenizer, meta, state)
        return folder

    # -- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train until steps or minutes are over, or a signal asks to stop; save last/ in every case.

        In the main thread, the first Ctrl-C or a SIGTERM ends the run after the step in progress, the second Ctrl-C
        at once.

        Raises:
            NonFiniteLossError: the message names the step; the checkpoints are those from before.
            OSError: a checkpoint could not be written; the one before is whole.
        """
        c = self.config
        if self.step == 0:
            randomness.seed_everything(c.seed)
        log = RunLog(c.out, self.step, c.tensorboard)
        self._started = time.perf_counter()
        figures: dict[str, float] = {}
        try:
            with self._signals():
                self.reporter.start(self.progress())
                with suppress(_StopAskedError):
                    if self.step == 0 and c.eval_every and not self._done():
                        self._evaluate(log)
                    while not self._done() and self._asked is None:
                        self._advance(log)
                self._check_finite()
                saved = self.save("last")
                if self._asked is None:
                    with suppress(_StopAskedError):
                        figures = self._finish(log)
                stopped = self._asked or "finished"
        finally:
            self.seconds, self._started = self._elapsed(), None
            self._asked = None
            self.reporter.stop()
            log.close()
        return Result(stopped, self.step, self.seconds, figures, saved)

    def _finish(self, log: RunLog) -> dict[str, float]:
        """The figures over the whole validation data, and best/ brought up to date."""
        c = self.config
        figures, targets = self.evaluate()
        before = self.best
        if c.eval_batches == 0 or not (c.out / "best").exists():
            self._keep_best(figures)
        else:  # earlier evaluations were over fewer batches, so compare like with like
            self._keep_best(self.evaluate(c.eval_batches)[0])
        if self.best != before:  # a run that is resumed to go further must know what to beat
            self.save("last")
        self._tell(log, figures)
        with self._evaluating():
            more = self.task.conclude(self.model, self.data, figures, targets, self._pulse)
        return {**figures, **more}

    def _done(self) -> bool:
        return self.fraction() >= 1

    def fraction(self) -> float:
        """How much of the run is over, 0 to 1, by whichever of steps and minutes is nearer its end."""
        c = self.config
        by_steps = self.step / c.steps if c.steps else (0.0 if c.steps is None else 1.0)
        by_clock = self._elapsed() / (60 * c.minutes) if c.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    def _total(self) -> float:
        """Steps in all; estimated from the clock where that will end the run."""
        c, fraction = self.config, self.fraction()
        if c.minutes is None:
            return float(c.steps or 0)
        return self.step / fraction if self.step and fraction else math.inf

    def rate(self) -> float:
        """The learning rate of the coming step."""
        c = self.config
        return learning_rate(
            self.step, self._total(), peak=c.lr, floor=c.min_lr, warmup=c.warmup, schedule=c.schedule, decay=c.decay
        )

    def _advance(self, log: RunLog) -> None:
        """One optimizer step, and what is due after it."""
        c, started = self.config, time.perf_counter()
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, tokens = self._accumulate()
        self.optimizer.step()
        norm = self.optimizer.grad_norm
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        both = torch.stack([loss, norm.to(loss)]) if norm is not None else loss.reshape(1)
        self._unchecked.append((self.step, rate, both))
        logged = self.step % c.log_every == 0 or self.step == 1
        if self.device.type == "cpu" or logged:  # elsewhere every look waits for the device
            values = self._check_finite()
            seconds = time.perf_counter() - started
            self._speed = _smooth(self._speed, tokens / max(seconds, 1e-9))
            self._pace = _smooth(self._pace, seconds)
            grad = values[1] if len(values) > 1 else math.nan
            progress = self.progress(loss=values[0], grad_norm=grad, lr=rate)
            self.reporter.step(progress)
            if logged:
                more = {} if math.isnan(grad) else {"train_grad_norm": grad}
                log.write(self.step, train_loss=values[0], train_lr=rate, train_tokens_per_s=self._speed, **more)
        if c.eval_every and self.step % c.eval_every == 0 and not self._done():
            self._evaluate(log)
        if c.save_every and self.step % c.save_every == 0 and not self._done():
            self._check_finite()
            self.save("last")

    def _accumulate(self) -> tuple[Tensor, int]:
        """Gradients of the mean loss over all targets of the step, however they are spread over its passes."""
        c = self.config
        first = self.step * c.accumulate
        passes = [self.batches[first + i] for i in range(c.accumulate)]
        targets = max(1, sum(int(count_targets(batch)) for batch in passes))  # none at all adds nothing
        total = torch.zeros((), device=self.device)
        self.model.train()
        for batch in passes:
            with self._autocast:
                loss = self.model(**self._move(batch), reduction="sum").loss
            loss = loss / targets
            loss.backward()
            total += loss.detach()
        return total, sum(map(count_tokens, passes))

    def _move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cuda":
            return {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in batch.items()}
        return {name: t.to(self.device) for name, t in batch.items()}

    def _check_finite(self) -> list[float]:
        """Loss and gradient norm of the last step, once those of every step not looked at yet are found finite."""
        values: list[float] = []
        for step, rate, both in self._unchecked:
            values = both.tolist()
            for name, value in zip(("loss", "gradient norm"), values, strict=False):
                if not math.isfinite(value):
                    kept = self.config.out / "last"
                    where = f"The last good checkpoint is {kept}" if kept.exists() else "No checkpoint was saved yet"
                    raise NonFiniteLossError(
                        f"{name} is {value} at step {step} (learning rate {rate:.2g}). {where}. "
                        "Try a lower lr, a longer warmup, clip 1, or fp32."
                    )
        self._unchecked.clear()
        return values

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, batches: int = 0) -> tuple[dict[str, float], int]:
        """The task's figures on the validation data, "loss" in nats per target among them, and the number of targets.

        Args:
            batches: this many, spread evenly over the data; 0 for all of it.
        """
        count = len(self.validation)
        chosen = range(count) if not 0 < batches < count else [i * count // batches for i in range(batches)]
        measure = self.task.measure(self.data)
        with self._evaluating():
            for index in chosen:
                self._pulse()
                measure.add(self.model, self._move(self.validation[index]))
        return measure.figures(), int(measure.targets)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._autocast:
                yield
        finally:
            self.model.train(was_training)

    def _pulse(self) -> None:
        if self._asked is not None:
            raise _StopAskedError

    def _evaluate(self, log: RunLog) -> None:
        self._check_finite()
        figures, _ = self.evaluate(self.config.eval_batches)
        self._tell(log, figures)
        if self.step:
            self._keep_best(figures)

    def _tell(self, log: RunLog, figures: dict[str, float]) -> None:
        log.write(self.step, **{f"validation_{name}": value for name, value in figures.items()})
        self.reporter.evaluation(self.step, figures)

    def _keep_best(self, figures: dict[str, float]) -> None:
        name = self.task.decisive(figures)
        value = figures[name]
        if self.best is None or (value < self.best if name == "loss" else value > self.best):
            self.best = value
            self.save("best")

    # -- clock, progress, signals ------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def progress(self, loss: float = math.nan, grad_norm: float = math.nan, lr: float = math.nan) -> Progress:
        """Where the run stands."""
        elapsed, fraction, c = self._elapsed(), self.fraction(), self.config
        left = math.nan
        if self._pace:
            left = math.inf if c.steps is None else (c.steps - self.step) * self._pace
            if c.minutes is not None:
                left = min(left, max(0.0, 60 * c.minutes - elapsed))
        return Progress(self.step, c.steps, fraction, elapsed, left, loss, self._speed, grad_norm, lr)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def say(text: str) -> None:
            with suppress(RuntimeError):  # the signal came while something was being printed
                self.reporter.message(text)

        def interrupt(number: int, frame: Any) -> None:
            if self._asked == "interrupted":
                raise KeyboardInterrupt
            self._asked = "interrupted"
            say("Ctrl-C: finishing this step, then saving. Press it again to stop at once.")

        def terminate(number: int, frame: Any) -> None:
            self._asked = self._asked or "terminated"
            say("SIGTERM: finishing this step, then saving.")

        before = [(s, signal.signal(s, f)) for s, f in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate))]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    """The device a name means; "auto" is the GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be {allowed}, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be {allowed}, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def is_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: "auto" means where the processor has units for it."""
    fast = device.type == "cuda" or native.isa() == "amx"
    return config.precision == "bf16" or (config.precision == "auto" and fast)


def make_optimizer(model: torch.nn.Module, config: TrainConfig, low: torch.dtype | None = None) -> AdamW:
    """AdamW that clips in its own pass, and leaves copies in `low` for the products of the next step. Matrices decay;
    biases and norms, pulled to zero, would only lose."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay, "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "decays": False},
    ]
    betas = (config.beta1, config.beta2)
    # An infinite limit clips nothing, but the norm is still found, to be logged and checked.
    limit = config.clip or math.inf
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, max_norm=limit, shadow_dtype=low)


def _smooth(mean: float, value: float) -> float:
    """The mean of about the last ten values; 0 is no value yet."""
    return 0.9 * mean + 0.1 * value if mean else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
