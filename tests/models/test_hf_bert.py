"""MaskedLM against transformers' BERT with each head: the same logits and gradients, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.models import MaskedLM, MaskedLMConfig
from tests.hf import zoo

NAMES = {"mlm": "BertForMaskedLM", "classify": "BertForSequenceClassification", "tag": "BertForTokenClassification"}
AUTO = {
    "mlm": "AutoModelForMaskedLM", "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}  # fmt: skip
TOKENS = torch.randint(3, zoo.VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12) < torch.tensor([[12], [7], [1]])
SEGMENTS = (torch.arange(12) > torch.tensor([[5], [3], [12]])).long()


def bert(name: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    values = {
        "vocab_size": zoo.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "initializer_range": 0.2, "num_labels": 3,
        "layer_norm_eps": 1e-5,
    }  # fmt: skip
    model = getattr(transformers, name)(transformers.BertConfig(**{**values, **changes})).eval()
    for p in model.parameters():  # biases and norms too
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def agree(ours: MaskedLM, theirs: Any, gradients: bool = True) -> None:
    ours.eval()
    inputs = {"attention_mask": MASK.long(), "token_type_ids": SEGMENTS}
    mine, expected = ours(TOKENS, mask=MASK, segments=SEGMENTS).logits, theirs(TOKENS, **inputs).logits
    real = MASK if ours.config.head != "classify" else slice(None)
    same(mine[real], expected[real])
    same(ours(TOKENS).logits, theirs(TOKENS).logits)
    if not gradients:
        return
    upstream = torch.randn_like(expected)
    if ours.config.head != "classify":
        upstream[~MASK] = 0
    mine.backward(upstream)
    expected.backward(upstream)
    same(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad)
    layer, block = theirs.bert.encoder.layer[0], ours.blocks[0]
    query, key, value = block.attention.qkv.weight.grad.chunk(3)
    same(query, layer.attention.self.query.weight.grad)
    same(key, layer.attention.self.key.weight.grad)
    same(value, layer.attention.self.value.weight.grad)
    same(block.mlp.up.weight.grad, layer.intermediate.dense.weight.grad)
    same(block.norm1.weight.grad, layer.attention.output.LayerNorm.weight.grad)


@pytest.mark.parametrize("head", NAMES)
def test_same_logits_both_ways(head: str, tmp_path: Path) -> None:
    import transformers

    theirs = bert(NAMES[head], pad_token_id=None)
    agree(MaskedLM.from_hf(theirs), theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = MaskedLM.from_hf(tmp_path / "theirs")
    assert ours.config.head == head and ours.config.classes == (None if head == "mlm" else 3)
    agree(ours, theirs, gradients=False)
    ours.to_hf(tmp_path / "ours")
    back = getattr(transformers, AUTO[head]).from_pretrained(tmp_path / "ours").eval()
    assert type(back).__name__ == NAMES[head]
    agree(ours, back, gradients=False)
    again = MaskedLM.from_hf(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_activations(activation: str) -> None:
    theirs = bert("BertForMaskedLM", hidden_act=activation)
    agree(MaskedLM.from_hf(theirs), theirs, gradients=False)


def test_attention_maps_on_request() -> None:
    theirs = bert("BertForMaskedLM", attn_implementation="eager")
    ours = MaskedLM.from_hf(theirs).eval()
    with pytest.warns(UserWarning, match=r"attention maps are O\(S\^2\): .* 3 x 4 x 12 x 12 weights"):
        loss, logits, maps = ours(TOKENS, mask=MASK, return_attention=True)
    assert loss is None and torch.equal(logits, ours(TOKENS, mask=MASK).logits) and len(maps) == 2
    for mine, expected in zip(maps, theirs(TOKENS, MASK.long(), output_attentions=True).attentions, strict=True):
        same(mine.transpose(1, 2)[MASK], expected.transpose(1, 2)[MASK])
        assert (mine.transpose(1, 3)[~MASK] == 0).all(), "nobody sees padding"
    with pytest.warns(UserWarning, match="attention maps"):
        trained = ours(TOKENS, TOKENS, MASK, return_attention=True)
    assert trained.loss is not None and len(trained.attention) == 2


def test_our_own_model_opens_in_transformers(tmp_path: Path) -> None:
    """Without segments too, which BERT cannot do without: they are written as zeros. Labels keep their names."""
    import transformers

    config = MaskedLMConfig(zoo.VOCAB, 16, 2, 4, 32, dropout=0.1, head="classify", classes=2)
    model = MaskedLM(config).eval()
    model.to_hf(tmp_path, labels=["bad", "good"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    same(theirs(TOKENS, attention_mask=MASK.long()).logits, model(TOKENS, mask=MASK).logits)
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(ValueError, match="labels must be 2 names, one a class, got 3"):
        model.to_hf(tmp_path, labels=["a", "b", "c"])


def test_another_head_takes_the_encoder_and_starts_anew() -> None:
    theirs = bert("BertModel")
    with pytest.raises(ValueError, match="head must be given: a BertModel has none"):
        MaskedLM.from_hf(theirs)
    ours = MaskedLM.from_hf(theirs, head="classify", classes=5).eval()
    assert torch.equal(ours.pooler.weight, theirs.pooler.dense.weight)
    assert ours(TOKENS).logits.shape == (3, 5)
    states = theirs(TOKENS, attention_mask=MASK.long()).last_hidden_state
    same(ours.encode(TOKENS, MASK)[MASK], states[MASK])
    tags = MaskedLM.from_hf(bert("BertForMaskedLM"), head="tag", classes=4)
    assert tags(TOKENS).logits.shape == (3, 12, 4)
    with pytest.raises(ValueError, match="classes must be None or 3, as in the checkpoint, got 4"):
        MaskedLM.from_hf(bert("BertForTokenClassification"), classes=4)


def test_files_of_2018(tmp_path: Path) -> None:
    """bert-base-uncased: gamma and beta, the head of next sentences and its pooler, a buffer."""
    from safetensors.torch import load_file, save_file

    theirs = bert("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    same(MaskedLM.from_hf(tmp_path).eval()(TOKENS).logits, theirs(TOKENS).prediction_logits)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type .* 'absolute', got 'relative_key'"),
        ({"hidden_act": "tanh"}, "hidden_act .* 'gelu' .*, got 'tanh'"),
        ({"is_decoder": True}, "is_decoder .* False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention .* False, got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings .* True, got False"),
        ({"classifier_dropout": 0.5}, "classifier_dropout .* None or 0.1, got 0.5"),
        ({"problem_type": "regression"}, "problem_type .* got 'regression'"),
        ({"model_type": "roberta"}, "model_type .* 'bert', got 'roberta'"),
        ({"architectures": ["BertForQuestionAnswering"]}, "architectures .* got 'BertForQuestionAnswering'"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}, "id2label .* at least two"),
        ({"num_hidden_layers": 3}, "the model has no encoder.layer.2.attention.self.query.weight"),
        ({"num_hidden_layers": 1}, "16 tensors with no place here: encoder.layer.1."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    bert("BertForMaskedLM").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=what):
        MaskedLM.from_hf(tmp_path)
