"""MaskedLM: config, heads, padding, loss, files. Beside transformers' BERT it stands in test_hf_bert.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.models import MaskedLM, MaskedLMConfig
from fastlm.models.masked_lm import IGNORE
from fastlm.optim import AdamW

SMALL = {"vocab_size": 61, "context": 12, "layers": 2, "heads": 4, "width": 32}
HEADS = {"mlm": {}, "classify": {"head": "classify", "classes": 3}, "tag": {"head": "tag", "classes": 4}}
each_head = pytest.mark.parametrize("head", HEADS)


def small(head: str, **changes: object) -> MaskedLM:
    model = MaskedLM(MaskedLMConfig(**{**SMALL, **HEADS[head], **changes}))  # type: ignore[arg-type]
    for p in model.parameters():  # larger weights than at the start, so that tokens matter
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def batch(model: MaskedLM, B: int = 4, S: int = 12) -> dict[str, Tensor]:
    """Rows of several lengths; targets at some of the real positions."""
    c = model.config
    mask = torch.arange(S) < torch.tensor([S, S - 1, 3, 1]).repeat(-(-B // 4))[:B, None]
    tokens = torch.randint(c.vocab_size, (B, S)).masked_fill(~mask, 0)
    targets = torch.randint(c.classes or c.vocab_size, (B,) if c.head == "classify" else (B, S))
    if c.head != "classify":
        targets = targets.masked_fill(~mask | (torch.rand(B, S) < 0.5), IGNORE)
        targets[0, 0] = 1
    return {"tokens": tokens, "targets": targets, "mask": mask}


def without_targets(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "targets"}


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"mlp_width": -1}, "mlp_width must be an integer of at least 1 or None, got -1"),
        ({"heads": 5}, "width must be a multiple of heads, got width=32, heads=5"),
        ({"activation": "swiglu"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'swiglu'"),
        ({"segments": -1}, "segments must be an integer of at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must lie in \[0, 1\), got -0.1"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
        ({"head": "next"}, "head must be one of mlm, classify, tag, got 'next'"),
        ({"head": "classify"}, "classes must be an integer .* with the head classify, got None"),
        ({"classes": 3}, "classes must be None with the head mlm, got 3"),
        ({"head": "tag", "classes": 2, "class_weights": (1.0,)}, "class_weights must be 2 finite numbers"),
        ({"class_weights": (1.0,)}, "class_weights must be None with the head mlm"),
    ],
)
def test_config_refuses(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MaskedLMConfig(**{**SMALL, **changes})


def test_config_survives_json() -> None:
    config = MaskedLMConfig(**SMALL, head="tag", classes=2, class_weights=[1, 2])  # type: ignore[arg-type]
    assert config.class_weights == (1.0, 2.0)
    assert MaskedLMConfig.from_dict({**dataclasses.asdict(config), "class_weights": [1.0, 2.0]}) == config
    with pytest.raises(ValueError, match=r"unknown names \['wide'\] and lacks \['width'\]"):
        MaskedLMConfig.from_dict({**{k: v for k, v in SMALL.items() if k != "width"}, "wide": 1})


def test_preset_has_the_published_size() -> None:
    with torch.device("meta"):
        model = MaskedLM(MaskedLMConfig.bert())
        assert model.num_parameters() == 109_514_298  # transformers' BertForMaskedLM
        assert model.num_parameters(embeddings=False) == 109_514_298 - (30522 + 512 + 2) * 768
        assert MaskedLM(MaskedLMConfig.bert(head="classify", classes=2)).num_parameters() == 109_483_778


# --- model -----------------------------------------------------------------------------------------------------------


def test_initialised_as_bert() -> None:
    model = MaskedLM(MaskedLMConfig.bert(vocab_size=1000, context=64, layers=2, heads=4, width=128))
    block = model.blocks[1]
    for weight in (model.embed.weight, block.attention.out.weight, block.mlp.down.weight, model.transform.dense.weight):
        assert abs(weight.std().item() - 0.02) < 0.001 and abs(weight.mean().item()) < 0.001
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    inputs = {"tokens": torch.randint(1000, (4, 64)), "targets": torch.randint(1000, (4, 64))}
    assert abs(model(**inputs).loss.item() - 6.9078) < 0.1  # log 1000: it knows nothing


@each_head
def test_a_row_does_not_depend_on_padding_or_on_its_neighbours(head: str) -> None:
    model = small(head).eval()
    inputs = batch(model)
    whole = model(**without_targets(inputs)).logits
    other = model(**without_targets({**inputs, "tokens": inputs["tokens"].masked_fill(~inputs["mask"], 7)})).logits
    for i, length in enumerate(inputs["mask"].sum(1).tolist()):
        alone = model(inputs["tokens"][i : i + 1, :length]).logits[0]
        for logits in (whole[i], other[i]):
            shown = logits if head == "classify" else logits[:length]
            torch.testing.assert_close(shown, alone, rtol=0, atol=2e-6 * alone.abs().max().item())


@each_head
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_of_torchs_cross_entropy_over_the_logits(head: str, reduction: str, weighted: bool) -> None:
    """mlm's loss, over the rows that have a target alone, is that over all rows."""
    if weighted and head == "mlm":
        return
    classes = {"classify": 3, "tag": 4}.get(head, 0)
    weights = tuple(0.5 + i for i in range(classes)) if weighted else None
    model = small(head, class_weights=weights)
    inputs = batch(model)
    weight = None if weights is None else torch.tensor(weights)
    flat = inputs["targets"].flatten()
    upstream = torch.randn(flat.shape if reduction == "none" else ())
    found = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            loss = model(**inputs, reduction=reduction).loss
        else:
            logits = model(**without_targets(inputs)).logits.flatten(0, -2)
            loss = F.cross_entropy(logits, flat, weight, reduction=reduction)
        loss.backward(upstream)
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(b.abs().max().item(), 1e-3))


def test_logits_come_with_the_loss_where_they_are_small() -> None:
    for head in HEADS:
        model = small(head)
        inputs = batch(model)
        loss, logits, _ = model(**inputs)
        assert loss is not None and (logits is None) == (head == "mlm")
        loss, shown, _ = model(**without_targets(inputs))
        assert loss is None and (head == "mlm" or torch.equal(shown, logits))


@each_head
def test_a_batch_without_targets_sums_to_nothing(head: str) -> None:
    model = small(head)
    inputs = batch(model)
    inputs["targets"] = torch.full_like(inputs["targets"], IGNORE)
    loss = model(**inputs, reduction="sum").loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_segments_are_told_apart() -> None:
    model = small("mlm", segments=2).eval()
    tokens = torch.randint(61, (2, 9))
    zeros, ones = torch.zeros_like(tokens), torch.ones_like(tokens)
    assert torch.allclose(model(tokens).logits, model(tokens, segments=zeros).logits, atol=1e-6)
    assert not torch.allclose(model(tokens).logits, model(tokens, segments=ones).logits, atol=1e-2)


@each_head
def test_dropout_acts_while_training_alone(head: str) -> None:
    model = small(head, dropout=0.3)
    inputs = without_targets(batch(model))
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@each_head
def test_under_autocast(head: str) -> None:
    model = small(head)
    inputs = batch(model)
    whole = model(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert abs(loss - whole) < 0.05 * whole
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_into_one_graph() -> None:
    """Though how many words are masked depends on the data."""
    model = small("mlm", layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        inputs = batch(model)
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


@each_head
def test_learns_by_heart(head: str) -> None:
    model = MaskedLM(MaskedLMConfig(**{**SMALL, **HEADS[head]}))
    inputs, optimizer = batch(model, 8), AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    first = model(**inputs).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert model(**inputs).loss < 0.1 * first


@each_head
def test_work_is_counted(head: str) -> None:
    """Against the products of one forward, counted by torch, with the head of mlm at a target in seven."""
    from torch.utils.flop_counter import FlopCounterMode

    model = MaskedLM(MaskedLMConfig(vocab_size=400, context=40, layers=2, heads=4, width=64, **HEADS[head]))
    for p in model.parameters():
        p.requires_grad_(False)
    tokens = torch.randint(400, (2, 40))
    with FlopCounterMode(display=False) as counter:
        for block in model.blocks:
            block.mlp(block.attention.out(block.attention.qkv(torch.zeros(80, 64))[:, :64]))
        if head == "mlm":
            F.linear(model.transform(torch.zeros(12, 64)), model.embed.weight)
        elif head == "tag":
            model.head(torch.zeros(80, 64))
        else:
            model.head(model.pooler(torch.zeros(2, 64)))
    attention = 2 * 2 * 2 * 40 * 40 * 64 * 2  # 2 layers, 2 rows, scores and values, 2 operations
    counted = 3 * (counter.get_total_flops() + attention) / tokens.numel()
    assert abs(model.flops_per_token() / counted - 1) < 0.02


def test_a_new_head_on_the_same_encoder() -> None:
    model = small("mlm", segments=2)
    other = model.with_head("classify", 5)
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(model.encode(tokens), other.encode(tokens))
    assert other.config.head == "classify" and other(tokens).logits.shape == (2, 5)
    other.embed.weight.data.zero_()
    assert model.embed.weight.any()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "changes", "error", "match"),
    [
        ("mlm", {"tokens": torch.zeros(2, 9)}, TypeError, "tokens must be a Tensor of int64, got torch.float32"),
        ("mlm", {"tokens": torch.zeros(2, 13).long()}, ValueError, r"\(B, S\) with S at most 12, got \(2, 13\)"),
        ("mlm", {"tokens": torch.full((2, 9), 61)}, ValueError, r"tokens must lie in 0 .. 60, got 61 .. 61"),
        ("mlm", {"mask": torch.ones(2, 9)}, TypeError, "mask must be a Tensor of bool .*, got torch.float32"),
        ("mlm", {"mask": torch.ones(2, 8).bool()}, ValueError, r"mask must be \(2, 9\) like the tokens, got \(2, 8\)"),
        ("mlm", {"segments": torch.zeros(2, 9).long()}, ValueError, "segments must be None: the config has segments=0"),
        ("mlm", {"targets": torch.zeros(2).long()}, ValueError, r"targets must be \(2, 9\) of int64 .*, got \(2,\)"),
        ("tag", {"targets": torch.zeros(2, 9)}, ValueError, "targets must be .* of int64 .*, got .* of torch.float32"),
        ("classify", {"targets": torch.zeros(2, 9).long()}, ValueError, r"must be \(2,\) of int64 .*, got \(2, 9\)"),
    ],
)
def test_forward_refuses(head: str, changes: dict, error: type[Exception], match: str) -> None:
    inputs = {"tokens": torch.zeros(2, 9, dtype=torch.int64), **changes}
    with pytest.raises(error, match=match):
        small(head)(**inputs)


def test_segments_are_checked() -> None:
    model, tokens = small("mlm", segments=2), torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"segments must lie in 0 .. 1, got 2 .. 2"):
        model(tokens, segments=tokens + 2)
    with pytest.raises(ValueError, match=r"segments must be \(2, 9\) like tokens, got \(2, 8\)"):
        model(tokens, segments=tokens[:, :8])


# --- files -----------------------------------------------------------------------------------------------------------


@each_head
def test_saved_and_loaded(head: str, tmp_path: Path) -> None:
    model = small(head, segments=2, class_weights=None if head == "mlm" else (1.0,) * HEADS[head]["classes"])
    model.save(tmp_path)
    loaded = MaskedLM.load(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert all(p.requires_grad for p in loaded.parameters())
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"layers": 2', '"layers": 1'))
    with pytest.raises(ValueError, match="layers is 2 there and 1 here"):
        MaskedLM.load(tmp_path)
