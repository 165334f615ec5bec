"""fastlm.hf's loss: stock's loss, gradients and logits, and in a training step no logits in memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm import hf
from fastlm.hf._logits import DeferredLogits
from tests.hf.zoo import MODELS, build, inputs

VOCAB = 101  # of a width that no other layer has


def enable(model: nn.Module) -> fastlm.patching.Report:
    return hf.enable(model, attention=False, norm=False, mlp=False, rope=False)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """To the largest entry of each; where that is rounding alone (the bias of keys), to the largest of all."""
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


def both(model: Any, step: Callable[[Any], Any], tolerance: float = 1e-5) -> Any:
    """step(model) returns a loss; stock and patched must give the same, gradients too. Returns the patched loss."""
    expected = step(model)
    expected.backward()
    wanted = gradients(model)
    enable(model)
    loss = step(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
    assert_close(gradients(model), wanted, tolerance)
    return loss


class Watch(TorchDispatchMode):
    """Notes every tensor of VOCAB columns and at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCAB,) and tensor.numel() >= self.elements:
                self.seen.add(f"{func} {tuple(tensor.shape)}")
        return result


@pytest.mark.parametrize("kind", ["plain", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_stocks(name: str, kind: str) -> None:
    model = build(name, vocab_size=VOCAB).train()
    batch = inputs(name, kind)
    logits = model(**batch).logits
    rows = batch["labels"].numel() - batch["labels"].shape[0]

    def step(model: Any) -> Tensor:
        with Watch(rows * VOCAB) as watch:
            output = model(**batch)
            seen = set(watch.seen)
            loss: Tensor = output.loss
        assert isinstance(output.logits, DeferredLogits) != bool(seen)
        torch.testing.assert_close(output.logits.detach(), logits.detach(), rtol=0.0, atol=0.0)
        return loss

    both(model, step)
    model.eval()
    patched = model(**batch)
    assert type(patched.logits) is Tensor
    hf.disable(model)
    torch.testing.assert_close(patched.loss, model(**batch).loss, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert"])
def test_in_bfloat16_as_near_to_float32_as_stock(name: str) -> None:
    exact = build(name).train()
    batch = inputs(name)
    exact(**batch).loss.backward()
    truth = gradients(exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = exact(**batch).loss
    loss.backward()
    stock = gradients(exact)
    enable(exact)
    with torch.autocast("cpu", torch.bfloat16):
        patched = exact(**batch)
    patched.loss.backward()
    assert patched.loss.dtype is loss.dtype
    assert isinstance(patched.logits, DeferredLogits) and patched.logits.dtype is torch.bfloat16
    ours = gradients(exact)
    for key in truth:
        size = truth[key].abs().max()
        worst = (stock[key] - truth[key]).abs().max()
        assert (ours[key] - truth[key]).abs().max() <= 1.5 * worst + 0.01 * size, key


OPTIONS: dict[str, dict[str, Any]] = {
    "num_items tensor": {"num_items_in_batch": torch.tensor(37)},
    "num_items int": {"num_items_in_batch": 11},
    "shift_labels": {"shift_labels": torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))},
    "ignore_index": {"ignore_index": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_losss_own_arguments(options: dict[str, Any]) -> None:
    batch = inputs("llama")
    batch["labels"][batch["labels"] < 0] = options.get("ignore_index", -100)
    both(build("llama").train(), lambda model: model(**batch, **options).loss)


def test_no_label_counts() -> None:
    model = build("llama").train()
    batch = {**inputs("llama"), "labels": torch.full((2, 12), -100)}
    model(**batch).loss.backward()
    stock = gradients(model)
    enable(model)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isnan()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, stock[name], equal_nan=True)


def test_a_label_out_of_range_raises_as_in_stock() -> None:
    model = build("llama").train()
    batch = inputs("llama")
    batch["labels"][0, 5] = 96
    with pytest.raises(IndexError):
        model(**batch)
    enable(model)
    with pytest.raises(IndexError):
        model(**batch)


def test_several_calls_and_one_backward() -> None:
    first, second = inputs("gpt2"), inputs("gpt2", "left")
    both(build("gpt2").train(), lambda model: model(**first).loss + 0.3 * model(**second).loss)


# What a model or its user may do with logits beside the loss.


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.view(-1, 96), labels.view(-1), label_smoothing=0.1)


def _weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, 96)
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1), weight)


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (loss * torch.linspace(0.0, 1.0, loss.numel())).sum()


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.view(-1, 96), torch.softmax(torch.ones(24, 96).cumsum(1) * 0.01, -1))


def _capped(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(torch.tanh(logits / 3.0) * 5.0, labels)


def _twice_capped(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(torch.tanh(2.0 * torch.tanh(logits)) * 5.0, labels)


def _turned_cap(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(torch.tanh(logits) * -2.0, labels)


def _shifted_and_scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed((logits + torch.linspace(0.0, 1.0, 96)) * 0.7, labels)


def _scaled_and_shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(logits * 0.7 + torch.linspace(0.0, 1.0, 96), labels)


def _first_row(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[0, -2], labels[0, 1])


def _both_uses(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(logits, labels) + 0.01 * logits.logsumexp(-1).pow(2).mean()


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    rows = logits.view(-1, 96)
    rows[:, 7] = -3.0
    rows.mul_(0.5)
    return _smoothed(logits, labels)


class _Double(torch.autograd.Function):
    """Its gradient is not that of its forward, so that a way around it shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * 3.0


def _through_a_function(logits: Tensor, labels: Tensor) -> Tensor:
    return _smoothed(_Double.apply(logits), labels)


def _metadata(logits: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(logits, Tensor) and logits.shape == (2, 12, 96) and logits.size(-1) == 96 and logits.dim() == 3
    assert logits.dtype is torch.float32 and logits.requires_grad and len(logits) == 2 and not logits.is_cuda
    return _smoothed(logits.to(logits.device).to(torch.float32).contiguous(), labels)


FUSED = (_smoothed, _weighted, _capped, _shifted_and_scaled, _first_row, _metadata)
MADE = (
    _each, _probabilities, _twice_capped, _turned_cap, _scaled_and_shifted, _both_uses, _in_place, _through_a_function,
)  # fmt: skip


@pytest.mark.parametrize("use", [*FUSED, *MADE], ids=lambda use: use.__name__.lstrip("_"))
def test_logits_of_any_use(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    batch = inputs("gpt2", labels=False)
    labels = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(4))
    kept: list[Any] = []

    def step(model: Any) -> Tensor:
        logits = model(**batch).logits
        kept.append(logits)
        return use(logits, labels)

    both(build("gpt2").train(), step)
    assert (kept[-1].fused is not None) == (use in FUSED or use is _both_uses)
    assert (kept[-1].maker == "") == (use in FUSED)


def test_logits_are_the_same_tensor_each_time_they_are_read_and_keep_their_graph() -> None:
    model = build("llama").train()
    enable(model)
    logits = model(**inputs("llama")).logits
    with torch.no_grad():
        first = logits.argmax(-1)
    assert torch.equal(logits.argmax(-1), first)
    assert (logits * 1.0).requires_grad and logits.data_ptr() == logits.data_ptr()
    assert "grad_fn" in repr(logits)


def test_logits_read_after_the_optimizers_step_raise() -> None:
    model = build("llama").train()
    enable(model)
    optimizer = fastlm.optim.AdamW(model.parameters())
    output = model(**inputs("llama"))
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"read outputs.logits before optimizer.step\(\)"):
        output.logits.sum()


# What may have changed about the head since it was patched.


def _hook(head: nn.Module) -> None:
    head.register_forward_hook(lambda module, args, output: output * 0.5)


def _forward_of_someone(head: nn.Module) -> None:
    before = head.forward
    head.forward = lambda x: before(x) * 0.5


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def _parametrized(head: nn.Module) -> None:
    parametrize.register_parametrization(head, "weight", _Halved())


def _frozen(head: nn.Module) -> None:
    head.requires_grad_(False)


@pytest.mark.parametrize("change", [_hook, _forward_of_someone, _parametrized, _frozen])
def test_a_head_that_changes_after_enable(change: Callable[[nn.Module], None]) -> None:
    batch, plain, patched = inputs("llama"), build("llama").train(), build("llama").train()
    enable(patched)
    for model in (plain, patched):
        change(model.lm_head)
    losses = [model(**batch).loss for model in (plain, patched)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0.0)
    assert_close(gradients(patched), gradients(plain))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_get_both_gradients(name: str) -> None:
    model = build(name, tie_word_embeddings=True).train()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = inputs(name)
    both(model, lambda model: model(**batch).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("llama").train()
    model.config.use_cache = False
    checkpoint = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    checkpoint({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch = inputs("llama")
    both(model, lambda model: model(**batch).loss)


def test_compiled() -> None:
    model = build("llama").train()
    batch = inputs("llama")
    torch.compiler.reset()
    both(model, lambda model: torch.compile(model, backend="eager")(**batch, use_cache=False).loss)


def test_copies_and_pickles_are_patched_for_themselves() -> None:
    model = build("llama").train()
    enable(model)
    batch = inputs("llama")
    loss = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.mul_(2.0)
        output = other(**batch)
        assert isinstance(output.logits, DeferredLogits) and output.loss != loss
    assert model(**batch).loss == loss


def tiny(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("name", "changes", "remark"),
    [
        ("Llama", {}, ""),
        ("Gemma2", {"head_dim": 8}, "softcap 30"),
        ("Cohere", {"logit_scale": 0.25}, "scaled by 0.25"),
        ("Granite", {"logits_scaling": 8.0}, "scaled by 0.125"),
    ],
)
def test_report_says_what_happens_to_the_logits(name: str, changes: dict[str, Any], remark: str) -> None:
    model = tiny(name, **changes).train()
    state = torch.random.get_rng_state()
    report = hf.enable(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    (entry,) = (entry for entry in report.entries if entry.part == "loss")
    assert (entry.name, entry.kind, entry.part, entry.by) == ("lm_head", "Linear", "loss", "ops.linear_cross_entropy")
    assert entry.reason == remark
    hf.disable(model)
    batch = inputs("llama")
    both(model, lambda model: model(**batch).loss)


class _Masking(transformers.LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels")
        output = super().forward(**kwargs)
        output.logits = output.logits.masked_fill(torch.arange(96) > 90, -1e4)
        output.loss = self.loss_function(output.logits, labels, 96)
        return output


def test_a_model_that_changes_its_logits_otherwise_is_left() -> None:
    model = _Masking(build("llama").config).train()
    with pytest.raises(ValueError, match="nothing to replace"):
        enable(model)
    report = fastlm.patching.Report("_Masking")
    hf.loss.apply(model, report)
    (entry,) = report.left
    assert entry.reason == "the model calls masked_fill on its logits before the loss"


def test_a_loss_function_of_the_user_is_called() -> None:
    batch = inputs("llama")

    def halved(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return 0.5 * nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=-100)

    model = build("llama").train()
    model.loss_function = halved
    both(model, lambda model: model(**batch).loss)
    assert model.loss_function is halved


def test_models_without_a_head_of_words_have_no_loss_to_fuse() -> None:
    config = transformers.LlamaConfig(**{**build("llama").config.to_dict(), "num_labels": 3})
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        report = fastlm.patching.Report(kind.__name__)
        hf.loss.apply(kind(config), report)
        assert report.entries == []
