"""CausalLM against transformers' GPT-2 and Llama: the same logits from the same weights, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.models import CausalLM, CausalLMConfig
from tests.hf import zoo

TOKENS = torch.randint(3, zoo.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def agree(ours: CausalLM, theirs: Any) -> None:
    """Logits, and the gradient of every weight through the same map of names, to 1e-5 of the largest."""
    upstream = torch.randn(2, 12, zoo.VOCAB)
    logits: Tensor = ours.eval()(TOKENS).logits
    expected: Tensor = theirs.eval()(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    logits.backward(upstream)
    expected.backward(upstream)
    want = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embed.weight.grad, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 48, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_same_logits_both_ways(name: str, changes: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    import transformers

    theirs = zoo.build(name, tie_word_embeddings=tied, **changes)
    agree(CausalLM.from_hf(theirs), theirs)
    theirs.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists(), "written in shards"
    ours = CausalLM.from_hf(tmp_path / "theirs")
    agree(ours, theirs)
    ours.to_hf(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back).__name__ == ("GPT2LMHeadModel" if name == "gpt2" else "LlamaForCausalLM")
    torch.testing.assert_close(back(TOKENS).logits, theirs.eval()(TOKENS).logits, rtol=0, atol=1e-5)
    again = CausalLM.from_hf(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_our_own_models_open_in_transformers(style: str, tmp_path: Path) -> None:
    """Without biases too, which GPT-2 cannot do without: they are written as zeros."""
    import transformers

    make = getattr(CausalLMConfig, style)
    model = CausalLM(make(vocab_size=zoo.VOCAB, context=16, layers=2, heads=4, width=32, bias=False)).eval()
    model.to_hf(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    tokens = theirs.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, model.generate(TOKENS[:, :4], 5, temperature=0))


def test_bfloat16_weights_come_as_float32(tmp_path: Path) -> None:
    theirs = zoo.build("llama").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = CausalLM.from_hf(tmp_path)
    assert ours.embed.weight.dtype is torch.float32
    assert torch.equal(ours.embed.weight, theirs.get_input_embeddings().weight.float())


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("llama", {"attention_bias": True}, "attention_bias .* False, got True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act .* 'silu', got 'gelu'"),
        ("llama", {"head_dim": 16}, "head_dim .* 8, got 16"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("mistral", {}, "sliding_window .* None, got 6"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop=0.3"),
        ("opt", {}, "model_type .* 'gpt2' or 'llama' or 'mistral', got 'opt'"),
    ],
)
def test_what_does_not_fit_is_named(name: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        CausalLM.from_hf(zoo.build(name, **changes))


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        CausalLM.from_hf(tmp_path / "none")
    with pytest.raises(TypeError, match="got Linear"):
        CausalLM.from_hf(torch.nn.Linear(2, 2))
    theirs = zoo.build("llama")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"9 tensors with no place here: layers\.1\."):
        CausalLM.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 16}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight must be \(96, 64\) by the config, got \(96, 32\)"):
        CausalLM.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match="must have hidden_size"):
        CausalLM.from_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin"):
        CausalLM.from_hf(tmp_path)


def test_export_of_what_neither_family_has(tmp_path: Path) -> None:
    config = CausalLMConfig(vocab_size=10, context=8, layers=1, heads=2, width=8, norm="rms")
    with pytest.raises(ValueError, match=r"neither GPT-2 .* nor Llama .*: got norm='rms', positions='learned'"):
        CausalLM(config).to_hf(tmp_path)
    assert not list(tmp_path.iterdir())
