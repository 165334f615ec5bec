"""Seq2SeqLM against transformers' BART, mBART and Marian: logits, loss, gradients and generation, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.models import Seq2SeqLM, Seq2SeqLMConfig
from fastlm.models._beam import lengths

VOCAB, PAD, BOS, EOS = 83, 0, 1, 2
GENERATOR = torch.Generator().manual_seed(5)
SOURCE = torch.randint(3, VOCAB, (3, 11), generator=GENERATOR)
MASK = torch.arange(11) < torch.tensor([[11], [4], [8]])
SOURCE[~MASK] = PAD
TOKENS = torch.randint(3, VOCAB, (3, 7), generator=GENERATOR)
TARGETS = torch.randint(3, VOCAB, (3, 7), generator=GENERATOR)
TARGETS[1, 4:] = -100
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartConfig", "BartForConditionalGeneration", {}),
    "bart, scaled, relu": ("BartConfig", "BartForConditionalGeneration", {
        "scale_embedding": True, "activation_function": "relu", "encoder_layers": 1,
    }),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", {"scale_embedding": True}),
    "marian": ("MarianConfig", "MarianMTModel", {"scale_embedding": True, "activation_function": "swish"}),
    "marian, two vocabularies": ("MarianConfig", "MarianMTModel", {
        "vocab_size": 97, "decoder_vocab_size": VOCAB, "share_encoder_decoder_embeddings": False,
    }),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, **changes: Any) -> Any:
    """Random, with large enough weights that every part has a say, and a bias of the logits."""
    import transformers

    config, model, values = FAMILIES[family]
    size = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    common = {
        "vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
        "max_position_embeddings": 32, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        "decoder_start_token_id": BOS, "forced_eos_token_id": None,
    }  # fmt: skip
    theirs = getattr(transformers, model)(getattr(transformers, config)(**{**common, **size, **values, **changes}))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "embed_positions" not in name or "marian" not in family:
                p.add_(torch.randn_like(p) * 0.1)
        theirs.final_logits_bias.normal_(std=0.3)
    return theirs.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@each_family
def test_logits_loss_and_gradients(family: str) -> None:
    theirs = build(family)
    ours = Seq2SeqLM.from_hf(theirs)
    inputs = {"input_ids": SOURCE, "attention_mask": MASK.long(), "decoder_input_ids": TOKENS}
    expected = theirs(**inputs, labels=TARGETS)
    close(ours.eval()(SOURCE, TOKENS, source_mask=MASK).logits, expected.logits)
    output = ours.train()(SOURCE, TOKENS, TARGETS, MASK)
    assert output.logits is None
    close(output.loss, expected.loss)
    (output.loss * 3.7).backward()
    (expected.loss * 3.7).backward()
    their = {
        "embed": theirs.model.decoder.embed_tokens.weight,
        "encoder.0.attention.out": "encoder.layers.0.self_attn.out_proj",
        "encoder.0.mlp.down": "encoder.layers.0.fc2",
        "decoder.1.cross.q": "decoder.layers.1.encoder_attn.q_proj",
        "decoder.0.cross.out": "decoder.layers.0.encoder_attn.out_proj",
        "decoder.1.norm2": "decoder.layers.1.encoder_attn_layer_norm",
        "decoder.1.mlp.up": "decoder.layers.1.fc1",
    }
    for mine, name in their.items():
        weight = theirs.model.get_submodule(name).weight if isinstance(name, str) else name
        close(ours.get_submodule(mine).weight.grad, weight.grad)
    cross = theirs.model.decoder.layers[0].encoder_attn
    kv = torch.cat((cross.k_proj.weight.grad, cross.v_proj.weight.grad))
    close(ours.get_submodule("decoder.0.cross.kv").weight.grad, kv)
    own = theirs.model.encoder.layers[0].self_attn
    qkv = torch.cat([getattr(own, f"{name}_proj").bias.grad for name in "qkv"])
    close(ours.get_submodule("encoder.0.attention.qkv").bias.grad, qkv)
    if ours.positions is not None and ours.source_positions is not None:
        close(ours.positions.weight.grad, theirs.model.decoder.embed_positions.weight.grad[2:])
        close(ours.source_positions.weight.grad, theirs.model.encoder.embed_positions.weight.grad[2:])
    if ours.source_embed is not None:
        close(ours.source_embed.weight.grad, theirs.model.encoder.embed_tokens.weight.grad)


@each_family
def test_folders_both_ways(family: str, tmp_path: Path) -> None:
    import transformers

    theirs = build(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Seq2SeqLM.from_hf(tmp_path / "theirs")
    ours.to_hf(tmp_path / "ours")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back) is type(theirs)
    inputs = {"input_ids": SOURCE, "attention_mask": MASK.long()}
    expected = theirs(**inputs, decoder_input_ids=TOKENS).logits
    close(ours.eval()(SOURCE, TOKENS, source_mask=MASK).logits, expected)
    close(back(**inputs, decoder_input_ids=TOKENS).logits, expected)
    again = Seq2SeqLM.from_hf(back)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    same_tokens(ours, back, num_beams=1)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_attention_maps_on_request(family: str) -> None:
    theirs = build(family, attn_implementation="eager")
    ours = Seq2SeqLM.from_hf(theirs).eval()
    with pytest.warns(UserWarning, match=r"attention maps are O\(S\^2\)"):
        output = ours(SOURCE, TOKENS, source_mask=MASK, return_attention=True)
    assert torch.equal(output.logits, ours(SOURCE, TOKENS, source_mask=MASK).logits)
    expected = theirs(SOURCE, MASK.long(), decoder_input_ids=TOKENS, output_attentions=True)
    for mine, name in zip(output.attention, ("encoder", "decoder", "cross"), strict=True):
        for layer, want in zip(mine, getattr(expected, f"{name}_attentions"), strict=True):
            rows = want.transpose(1, 2)[MASK] if name == "encoder" else want
            close(layer.transpose(1, 2)[MASK] if name == "encoder" else layer, rows)
    with pytest.warns(UserWarning, match="attention maps"):
        trained = ours(SOURCE, TOKENS, TARGETS, MASK, return_attention=True)
    assert trained.loss is not None and len(trained.attention.cross) == 2


def same_tokens(ours: Seq2SeqLM, theirs: Any, num_beams: int, **options: Any) -> int:
    """Generates with both; the number of targets that ended before the last step."""
    found = ours.generate(
        SOURCE, 12, source_mask=MASK, beams=num_beams, length_penalty=options.get("length_penalty", 1.0)
    )
    expected = theirs.generate(
        SOURCE,
        attention_mask=MASK.long(),
        max_new_tokens=12,
        do_sample=False,
        num_beams=num_beams,
        bad_words_ids=[[PAD]],
        **options,
    )[:, 1:]
    count = lengths(expected, EOS)
    assert torch.equal(lengths(found, EOS), count)
    for row in range(len(found)):
        assert found[row, : count[row]].tolist() == expected[row, : count[row]].tolist()
    return int((count < 12).sum())


def test_beams_find_what_transformers_finds() -> None:
    ended = 0
    for seed in range(3):
        torch.manual_seed(seed)
        theirs = build("bart")
        theirs.final_logits_bias[0, EOS] += 3.0
        ours = Seq2SeqLM.from_hf(theirs)
        for length_penalty in (1.0, 2.0, 0.0, -1.0):
            for beams in (2, 4):
                ended += same_tokens(ours, theirs, beams, length_penalty=length_penalty, early_stopping="never")
    assert 10 < ended < 3 * 3 * 8, "some targets must end before the last step, some not"


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("bart", {"decoder_attention_heads": 2}, "decoder_attention_heads .* 4, got 2"),
        ("bart", {"decoder_ffn_dim": 64}, "decoder_ffn_dim .* 48, got 64"),
        ("bart", {"encoder_layerdrop": 0.1}, "encoder_layerdrop"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bart", {"activation_function": "tanh"}, "activation_function"),
    ],
)
def test_what_does_not_fit_is_named(family: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Seq2SeqLM.from_hf(build(family, **changes))


def test_other_families_and_dropout_inside_the_mlp() -> None:
    from tests.hf import zoo

    with pytest.raises(ValueError, match=r"model_type .* 'bart' or 'mbart' or 'marian', got 't5'"):
        Seq2SeqLM.from_hf(zoo.build("t5"))
    with pytest.warns(UserWarning, match=r"activation_dropout=0\.1 is left out"):
        Seq2SeqLM.from_hf(build("bart", activation_dropout=0.1))


def test_export_of_what_no_family_has(tmp_path: Path) -> None:
    size = {"vocab_size": VOCAB, "context": 8, "layers": 1, "heads": 2, "width": 8}
    with pytest.raises(ValueError, match=r"none of .*got .*'positions': 'learned', 'embed_norm': False"):
        Seq2SeqLM(Seq2SeqLMConfig(**size)).to_hf(tmp_path)
    with pytest.raises(ValueError, match="eos of the config must be an id"):
        Seq2SeqLM(Seq2SeqLMConfig.bart(**size, eos=None)).to_hf(tmp_path)
    assert not list(tmp_path.iterdir())
