"""The loop: it learns, counts tokens truly, stops as asked, resumes exactly."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm._shadow import find
from fastlm.data import IGNORE, Dataset, SequentialWindows
from fastlm.models import CausalLM
from fastlm.train import ModelOptions, NonFiniteLossError, Progress, Reporter, Trainer, read_log
from fastlm.train.trainer import make_optimizer, pick_device

from .conftest import MODEL, Make


class At(Reporter):
    """Calls `act` after a step, once."""

    def __init__(self, step: int, act: Any) -> None:
        self.at, self.act, self.messages = step, act, list[str]()

    def step(self, progress: Progress) -> None:
        if progress.step == self.at:
            self.act()

    def message(self, text: str) -> None:
        self.messages.append(text)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_writes_everything(make: Make, tmp_path: Path) -> None:
    trainer = make(steps=80, lr=1e-2, eval_every=40, save_every=40, tensorboard=True)
    before = trainer.evaluate()[0]["loss"]
    result = trainer.fit()
    assert result.stopped == "finished" and result.steps == 80
    assert result.validation_loss < before - 0.5
    assert result.figures["perplexity"] == pytest.approx(math.exp(result.validation_loss))
    assert 0 < result.figures["bits_per_byte"] < 8
    run = tmp_path / "run"
    assert {p.name for p in (run / "best").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "checkpoint.json",
    }  # fmt: skip
    assert (run / "last" / "state.pt").exists() and list((run / "tensorboard").iterdir())
    rows = read_log(run / "log.jsonl")
    assert [r["step"] for r in rows if "train_loss" in r] == list(range(1, 81))
    assert [r["step"] for r in rows if "validation_loss" in r] == [0, 40, 80]
    assert {"train_lr", "train_tokens_per_s", "train_grad_norm"} <= set(rows[1])
    best = CausalLM.load(run / "best")
    assert equal(weights(best), weights(trainer.model))


def test_a_run_is_a_function_of_its_seed(make: Make) -> None:
    runs = [make(seed=seed) for seed in (1, 1, 2)]
    for i, trainer in enumerate(runs):
        random.random(), np.random.rand(i + 1), torch.rand(i + 1)  # whatever was drawn before does not matter
        trainer.fit()
    a, b, c = (weights(t.model) for t in runs)
    assert equal(a, b) and not equal(a, c)


@pytest.mark.parametrize("at", [1, 7, 19])
def test_a_resumed_run_is_the_uninterrupted_one(make: Make, tmp_path: Path, at: int) -> None:
    settings: dict[str, Any] = {"accumulate": 2, "eval_every": 5}
    whole = make(**settings)
    whole.fit()
    shutil.rmtree(tmp_path / "run")

    first = make(**settings)
    first.reporter = At(at, lambda: setattr(first, "_asked", "interrupted"))
    result = first.fit()
    assert result.stopped == "interrupted" and result.steps == at and math.isnan(result.validation_loss)

    second = make(**settings)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    second.resume()
    assert second.step == at
    assert second.fit().steps == 20
    assert equal(weights(whole.model), weights(second.model))
    a, b = whole.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    steps = [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "train_loss" in row]
    assert steps == list(range(1, 21)), "every step logged once"


def test_generators_are_restored(make: Make) -> None:
    first = make(steps=3)
    first.fit()
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    second = make(steps=3)
    second.resume()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_accumulation_divides_by_the_tokens_there_are(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with different numbers of ignored targets give the gradient of the one large batch they make up."""
    model = ModelOptions(style="gpt2", layers=1, heads=2, width=32, context=16)
    one, four = make(batch=8, model=model), make(batch=2, accumulate=4, model=model)
    x, y = one.batches[0].values()
    y = y.clone()
    y[0] = y[3, 5:] = y[7, 1:] = IGNORE
    monkeypatch.setattr(one, "batches", [{"tokens": x, "targets": y}])
    parts = [{"tokens": x[i : i + 2], "targets": y[i : i + 2]} for i in range(0, 8, 2)]
    monkeypatch.setattr(four, "batches", parts)
    (loss_one, tokens_one), (loss_four, tokens_four) = one._accumulate(), four._accumulate()
    assert tokens_one == tokens_four == x.numel()
    torch.testing.assert_close(loss_one, loss_four)
    for p, q in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
    expected = one.model(x, y, reduction="mean")[0]
    torch.testing.assert_close(loss_one, expected.detach())


def test_evaluation_covers_every_token_once(make: Make, data: Dataset) -> None:
    trainer = make()
    trainer.validation = SequentialWindows(data.validation.tokens, 16, 4)
    loss, count = trainer.evaluate()
    assert count == len(data.validation) - 1 and trainer.model.training
    some, fewer = trainer.evaluate(1)
    assert fewer < count and some != loss
    state = torch.get_rng_state()
    assert trainer.evaluate()[0] == loss
    assert torch.equal(torch.get_rng_state(), state)


def test_only_matrices_decay(make: Make) -> None:
    trainer = make(weight_decay=0.3)
    decays, not_decays = trainer.optimizer.param_groups
    assert decays["weight_decay"] == 0.3 and all(p.dim() >= 2 for p in decays["params"])
    assert not_decays["weight_decay"] == 0.0 and all(p.dim() < 2 for p in not_decays["params"])
    assert len(decays["params"]) + len(not_decays["params"]) == len(list(trainer.model.parameters()))
    assert make_optimizer(torch.nn.Linear(2, 2, bias=False), trainer.config).param_groups[0]["decays"]


def test_clipping(make: Make) -> None:
    free, clipped = make(steps=1, clip=0.0), make(steps=1, clip=1e-3)
    for trainer in (free, clipped):
        trainer.fit()
        assert math.isfinite(float(trainer.optimizer.grad_norm))  # type: ignore[arg-type]
    moments = [next(iter(t.optimizer.state.values()))["exp_avg"].abs().max() for t in (free, clipped)]
    assert moments[1] < 0.1 * moments[0]


def test_bf16(make: Make) -> None:
    trainer = make(steps=3, precision="bf16")
    trainer.fit()
    assert all(p.dtype is torch.float32 for p in trainer.model.parameters())


def test_shadows_change_nothing_but_time(make: Make) -> None:
    """The bfloat16 copies that the optimizer writes are what autocast's casts would be."""
    runs = [make(steps=4, precision="bf16", device="cpu") for _ in range(2)]
    assert runs[0].optimizer.shadow_dtype is torch.bfloat16
    runs[1].optimizer.shadow_dtype = None
    for trainer in runs:
        trainer.fit()
    assert all(find(p, torch.bfloat16) is not None for p in runs[0].model.parameters())
    assert not any(find(p, torch.bfloat16) is not None for p in runs[1].model.parameters())
    assert equal(weights(runs[0].model), weights(runs[1].model))
    assert make(precision="fp32").optimizer.shadow_dtype is None


def test_the_clock_stops_a_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(steps=None, minutes=1.0, warmup=0, schedule="linear", lr=1.0, min_lr=0.0)
    now = 0.0

    def tick() -> float:
        return now

    monkeypatch.setattr("fastlm.train.trainer.time.perf_counter", tick)
    seen = []

    class Watch(Reporter):
        def step(self, progress: Progress) -> None:
            nonlocal now
            seen.append((progress.step, progress.lr))
            now += 6.0

    trainer.reporter = Watch()
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    assert trainer.fit().steps == 10
    assert [rate for _, rate in seen[1:]] == pytest.approx([1 - i / 10 for i in range(1, 10)])


def test_zero_steps(make: Make) -> None:
    result = make(steps=0).fit()
    assert result.stopped == "finished" and result.steps == 0 and math.isfinite(result.validation_loss)


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_the_run_after_the_step(make: Make, number: int, stopped: str) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reporter = At(5, lambda: os.kill(os.getpid(), number))
    trainer = make(reporter)
    result = trainer.fit()
    assert result.stopped == stopped and result.steps == 5
    assert json.loads((result.checkpoint / "checkpoint.json").read_text())["step"] == 5
    assert any("saving" in message for message in reporter.messages)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_ctrl_c_stops_at_once(make: Make, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(At(5, twice)).fit()
    assert not (tmp_path / "run" / "last").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_during_an_evaluation(make: Make, data: Dataset) -> None:
    trainer = make(steps=4, eval_every=2)
    calls = 0

    class Validation(SequentialWindows):
        def __getitem__(self, index: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:  # two batches at step 0, the first one at step 2
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    trainer.validation = Validation(data.validation.tokens, 16, 4)
    result = trainer.fit()
    assert result.stopped == "interrupted" and result.steps == 2 and trainer.model.training


def test_a_loss_that_is_not_finite(make: Make, tmp_path: Path) -> None:
    trainer = make(save_every=4)

    def spoil() -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)

    trainer.reporter = At(6, spoil)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 7 .*run/last.*lower lr"):
        trainer.fit()
    assert json.loads((tmp_path / "run" / "last" / "checkpoint.json").read_text())["step"] == 4
    again = make(save_every=4)
    again.resume()
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_a_gradient_that_is_not_finite(make: Make) -> None:
    trainer = make()
    next(trainer.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (inf|nan) at step 1 .*No checkpoint was saved yet"):
        trainer.fit()


def test_model_and_data_must_fit(make: Make, data: Dataset, tmp_path: Path) -> None:
    trainer = make()
    model = CausalLM(MODEL.config(data.tokenizer.vocab_size + 1))
    with pytest.raises(ValueError, match=r"model has vocab_size \d+, its data in .* has \d+"):
        Trainer(model, data, trainer.config)
    with pytest.raises(ValueError, match="a context of 100000 needs at least 100001"):
        make(model=ModelOptions(style="llama", layers=1, heads=2, width=32, context=100_000))
    assert not (tmp_path / "run").exists()


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device .*{name}"):
            pick_device(name)
