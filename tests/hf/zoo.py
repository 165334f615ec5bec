"""Small transformers models with random weights, one of each family that fastlm.hf promises to leave as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.21", reason="transformers 5.21 needs Python 3.11")
PreTrainedModel = transformers.PreTrainedModel

VOCAB, PAD = 96, 0
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": PAD,
}  # fmt: skip
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

# name: (config class, model class, values of the config). build() sets dropout to 0.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        **_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
    }),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_DECODER, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": PAD, "bos_token_id": 1,
        "eos_token_id": 2,
    }),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_ENCODER, "pad_token_id": PAD}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {
        **_ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": 0,
    }),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**_BART, "max_position_embeddings": 64}),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {
        **_BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
}  # fmt: skip
MODELS = tuple(_FAMILIES)
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta", "modernbert")
SEQ2SEQ = ("t5", "bart", "whisper")


def build(name: str, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """The model of that name in float32, with the same weights each time; dropout 0 unless the changes say otherwise.

    Args:
        attention: attn_implementation; None is what transformers chooses for the model (sdpa, gemma2 eager).

    The weights are larger than a model's at its start and norms are not ones, so that every part matters.
    """
    config_name, model_name, values = _FAMILIES[name]
    config = getattr(transformers, config_name)(**{**values, **changes})
    for key in config.to_dict():
        if "drop" in key and isinstance(getattr(config, key), float) and key not in changes:
            setattr(config, key, 0.0)
    make: Callable[..., PreTrainedModel] = getattr(transformers, model_name)._from_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.2)
    return model


def inputs(name: str, kind: str = "plain", labels: bool = True, batch: int = 2, length: int = 12) -> dict[str, Any]:
    """A batch for that model.

    Args:
        kind: "plain"; "left" or "right", padded on that side (encoder-decoders: the source); "packed", two documents
            one behind the other in each row, told by position_ids alone (decoders without learned offsets only).
        labels: with labels, -100 where there is padding and at one more place.
    """
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCAB, (batch, length), generator=generator)
    goal = torch.randint(3, VOCAB, (batch, length), generator=generator) if name in ENCODERS else tokens.clone()
    goal[0, length // 2] = -100
    mask = torch.ones_like(tokens)
    result: dict[str, Any] = {}
    if kind in ("left", "right"):
        short = length - length // 3
        outside = slice(0, length - short) if kind == "left" else slice(short, length)
        mask[0, outside] = 0
        tokens[mask == 0] = PAD
        if name not in SEQ2SEQ:
            goal[mask == 0] = -100
        result["attention_mask"] = mask
        if kind == "left" and name in DECODERS and name != "opt":
            result["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    elif kind == "packed":
        first = length // 2 - 1
        result["position_ids"] = torch.cat((torch.arange(first), torch.arange(length - first))).expand(batch, -1)
        result["use_cache"] = False
    elif kind != "plain":
        raise ValueError(f"kind must be plain, left, right or packed, got {kind!r}")
    if name == "whisper":
        result.pop("attention_mask", None)
        result["input_features"] = torch.randn((batch, 8, 24), generator=generator)
    else:
        result["input_ids"] = tokens
    if name in SEQ2SEQ:
        target = torch.randint(3, VOCAB, (batch, length - 3), generator=generator)
        result["decoder_input_ids"] = torch.cat((torch.full((batch, 1), 2), target[:, :-1]), 1)
        goal = target.clone()
        goal[1, -2:] = -100
    if labels:
        result["labels"] = goal
    return result
