"""transformers.Trainer on an enabled model: the losses of stock, evaluation, checkpoints, folders, LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fastlm import hf, optim
from tests.hf.test_loss import assert_close, gradients
from tests.hf.zoo import build, inputs

# What the Trainer and peft themselves call.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens of which each row trains another number."""

    def __init__(self, count: int = 64, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(3, 96, (count, length), generator=generator)
        self.labels = self.tokens.clone()
        for row in range(count):
            self.labels[row, : row % (length - 2)] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    own = {"callbacks", "compute_metrics", "optimizer_cls_and_kwargs"}
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1,
        "learning_rate": 5e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        **{name: value for name, value in options.items() if name not in own},
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        **{name: value for name, value in options.items() if name in own},
    )


def losses(trainer: Trainer, **options: Any) -> list[float]:
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def enabled(name: str, **changes: Any) -> Any:
    model = build(name, **changes)
    hf.enable(model)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_are_stocks_with_and_without_accumulation(name: str, tmp_path: Path) -> None:
    stock = losses(trainer(build(name), tmp_path))
    ours = losses(trainer(enabled(name), tmp_path))
    parts = losses(trainer(enabled(name), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    assert len(stock) == 4 and stock[0] != stock[3]
    assert ours == pytest.approx(stock, rel=1e-5)
    assert parts == pytest.approx(stock, rel=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "smoothing": {"label_smoothing_factor": 0.1},
    "adamw": {"optim": "adamw_torch"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_stocks_with(options: dict[str, Any], tmp_path: Path) -> None:
    tolerance = 5e-3 if "bf16" in options else 1e-5
    stock = losses(trainer(build("llama"), tmp_path, **options))
    assert losses(trainer(enabled("llama"), tmp_path, **options)) == pytest.approx(stock, rel=tolerance)


def accuracy(prediction: Any) -> dict[str, float]:
    assert prediction.predictions.shape == (16, 12, 96)
    return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}


@pytest.mark.parametrize("options", [{"compute_metrics": accuracy}, {"prediction_loss_only": True}], ids=str)
def test_evaluation_is_stocks(options: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for model in (build("llama"), enabled("llama")):
        run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, **options)
        run.train()
        results.append([entry for entry in run.state.log_history if "eval_loss" in entry])
    for stock, ours in zip(*results, strict=True):
        assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5)
        assert ours.get("eval_accuracy") == stock.get("eval_accuracy")


@pytest.mark.parametrize("tied", [False, True])
def test_folders_are_stocks_byte_for_byte(tied: bool, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "stock")
    hf.enable(model)
    model.save_pretrained(tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(loaded) is transformers.LlamaForCausalLM
    hf.enable(loaded)
    batch = inputs("llama")
    torch.testing.assert_close(loaded.train()(**batch).loss, model.train()(**batch).loss, rtol=0.0, atol=0.0)


def test_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(enabled("llama"), tmp_path, **saving)
    expected = losses(whole)
    resumed = trainer(enabled("llama"), tmp_path, **saving)
    assert losses(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == expected
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
    weights = load_file(tmp_path / "checkpoint-4/model.safetensors")
    assert weights.keys() <= build("llama").state_dict().keys()


def lora(model: Any, *more: str) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj", *more], task_type="CAUSAL_LM"
    )
    torch.manual_seed(6)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


@pytest.mark.parametrize("more", [(), ("lm_head",)], ids=["layers", "head"])
@pytest.mark.parametrize("order", ["lora on enabled", "enable on lora"])
def test_lora(order: str, more: tuple[str, ...]) -> None:
    batch = inputs("llama", "right")
    stock = lora(build("llama"), *more).train()
    if order == "enable on lora":
        ours = lora(build("llama"), *more).train()
        report = hf.enable(ours)
        head = [entry for entry in report.entries if entry.part == "loss"]
        assert [entry.by for entry in head] == [None if more else "ops.linear_cross_entropy"]
    else:
        ours = lora(enabled("llama"), *more).train()
    expected, loss = stock(**batch).loss, ours(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    expected.backward()
    loss.backward()
    wanted = gradients(stock)
    assert all("lora" in name for name in wanted)
    assert_close(gradients(ours), wanted)
    merged, plain = ours.merge_and_unload(), stock.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}
    merged.requires_grad_()
    plain.requires_grad_()
    loss, expected = merged(**batch).loss, plain(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    hf.disable(merged)
    torch.testing.assert_close(merged(**batch).logits, plain(**batch).logits, rtol=0.0, atol=0.0)


def test_lora_through_the_trainer(tmp_path: Path) -> None:
    stock = losses(trainer(lora(build("llama")), tmp_path))
    model = lora(build("llama"))
    hf.enable(model)
    assert losses(trainer(model, tmp_path)) == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}], ids=str)
def test_optimizer(options: dict[str, Any], tmp_path: Path) -> None:
    args = {"weight_decay": 0.1, "adam_beta2": 0.95}
    stock = trainer(build("llama"), tmp_path, **args)
    expected = losses(stock)
    settings = hf.optimizer(TrainingArguments(str(tmp_path), learning_rate=5e-3, use_cpu=True, **args), **options)
    ours = trainer(enabled("llama"), tmp_path, optimizer_cls_and_kwargs=settings, **args)
    found = losses(ours)
    inner = ours.optimizer.optimizer  # accelerate wraps it
    assert isinstance(inner, optim.AdamW)
    assert found == pytest.approx(expected, rel=1e-2 if options else 1e-5)
    for group, other in zip(inner.param_groups, stock.optimizer.optimizer.param_groups, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
        assert {key: group[key] for key in ("betas", "eps", "weight_decay", "lr")} == {
            key: other[key] for key in ("betas", "eps", "weight_decay", "lr")
        }
    decays = [group["weight_decay"] for group in inner.param_groups]
    assert decays == [0.1, 0.0] and all(p.dim() == 1 for p in inner.param_groups[1]["params"])


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = hf.ThroughputCallback(peak=1e9)
    model = enabled("llama")
    run = trainer(
        model, tmp_path, callbacks=[callback], logging_steps=2, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    lines = re.findall(r"step (\d+): ([\d,]+) tokens/s, ([\d.]+) % of 0.001 TFLOP/s", capsys.readouterr().out)
    assert [int(step) for step, *_ in lines] == [2, 4]
    for entry, (_, rate, mfu) in zip(entries, lines, strict=True):
        assert int(rate.replace(",", "")) == round(entry["tokens_per_second"])
        assert float(mfu) == pytest.approx(100 * entry["mfu"], abs=0.06)
        # 2 layers of q, o 32 x 32, k, v 32 x 16, gate, up, down 32 x 64; the head 32 x 96; 12 L C T
        flops = 6 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 96) + 12 * 2 * 32 * 12
        assert entry["mfu"] * 1e9 == pytest.approx(entry["tokens_per_second"] * flops)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_throughput_of_a_model_half_frozen_and_of_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_()
    callback = hf.ThroughputCallback()
    run = trainer(model, tmp_path, callbacks=[callback], max_steps=1)
    run.train()
    entry = run.state.log_history[0]
    assert entry["tokens_per_second"] > 0 and ("mfu" in entry) == (name == "llama")
    if name == "llama":
        flops = 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 6 * 32 * 96 + 12 * 2 * 32 * 12
        assert entry["mfu"] * callback._peak == pytest.approx(entry["tokens_per_second"] * flops)


def test_peak_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="peak must be above 0 FLOP/s, or None to measure it, got 0"):
        hf.ThroughputCallback(0)
