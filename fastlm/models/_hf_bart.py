"""Seq2SeqLM from and to transformers' BART, mBART and Marian: names, shapes, and what does not fit.

They differ in where the norms stand, in the kind of positions and in what embeddings are shared. BART and mBART keep
two rows of positions before the first. q, k, v (k, v of cross-attention) are apart there, one matrix here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastlm.models._hf import HFWeights, fields, require

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu", "silu": "silu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}  # fmt: skip
CLASSES = {"bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration", "marian": "MarianMTModel"}
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": {"norm_position": "post", "positions": "learned", "embed_norm": True, "shared": ("all",)},
    "mbart": {"norm_position": "pre", "positions": "learned", "embed_norm": True, "shared": ("all",)},
    "marian": {"norm_position": "post", "positions": "sinusoidal", "embed_norm": False, "shared": ("all", "target")},
}
OFFSET = 2  # rows of positions before the first in BART and mBART

_BLOCK = {  # our layer: theirs, in the parts our matrix is made of
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "mlp.up": ("fc1",),
    "mlp.down": ("fc2",),
    "norm1": ("self_attn_layer_norm",),
}
_ENCODER = {**_BLOCK, "norm2": ("final_layer_norm",)}
_DECODER = {
    **_BLOCK,
    "cross.q": ("encoder_attn.q_proj",),
    "cross.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross.out": ("encoder_attn.out_proj",),
    "norm2": ("encoder_attn_layer_norm",),
    "norm3": ("final_layer_norm",),
}


def config_from_hf(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of Seq2SeqLMConfig.

    Raises:
        ValueError: another family, or a field that asks for what Seq2SeqLM has not.
    """
    require(config, model_type=tuple(CLASSES))
    kind = config["model_type"]
    vocab, context, width, layers, heads, hidden, decoder_layers, eos = fields(
        config, "vocab_size", "max_position_embeddings", "d_model", "encoder_layers", "encoder_attention_heads",
        "encoder_ffn_dim", "decoder_layers", "eos_token_id",
    )  # fmt: skip
    require(
        config, decoder_attention_heads=(heads,), decoder_ffn_dim=(hidden,), activation_function=tuple(ACTIVATIONS),
        encoder_layerdrop=(0.0, None), decoder_layerdrop=(0.0, None), tie_word_embeddings=(True,),
    )  # fmt: skip
    if config.get("activation_dropout"):
        warnings.warn(
            f"activation_dropout={config['activation_dropout']} is left out: it acts in training alone, and the MLP "
            "here has no dropout inside",
            stacklevel=4,
        )
    apart = kind == "marian" and not config.get("share_encoder_decoder_embeddings", True)
    bias = state.get("final_logits_bias")
    family = {name: value for name, value in FAMILIES[kind].items() if name != "shared"}
    return family | {
        "vocab_size": config.get("decoder_vocab_size") or vocab if apart else vocab, "context": context,
        "layers": layers, "heads": heads, "width": width, "decoder_layers": decoder_layers,
        "source_vocab_size": vocab if apart else None, "mlp_width": hidden, "shared": "target" if apart else "all",
        "activation": ACTIVATIONS[config.get("activation_function", "gelu")],
        "embed_scale": bool(config.get("scale_embedding")),
        "logits_bias": bias is not None and bool(bias.any()),
        "dropout": float(config.get("dropout") or 0.0),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "pad": config.get("pad_token_id"), "bos": config.get("decoder_start_token_id"),
        "eos": eos[0] if isinstance(eos, list) else eos,
    }  # fmt: skip


def state_from_hf(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Seq2SeqLM's state dict, from the transformers model's.

    Args:
        c: Seq2SeqLMConfig.

    Raises:
        ValueError: tensors are missing, too many, or of another shape.
    """
    given, C = HFWeights(state, "model."), c.width
    if c.shared == "target":
        made = {
            "embed.weight": given.take("decoder.embed_tokens.weight", c.vocab_size, C),
            "source_embed.weight": given.take("encoder.embed_tokens.weight", c.source_vocab_size, C),
        }
    else:
        made = {"embed.weight": given.take("shared.weight", c.vocab_size, C)}
    if c.logits_bias:
        made["logits_bias"] = given.take("final_logits_bias", 1, c.vocab_size)[0]
    learned = c.positions == "learned"
    for ours, theirs, layers, names in _stacks(c):
        prefix = "source_" if theirs == "encoder" else ""
        if learned:
            made[f"{prefix}positions.weight"] = given.take(f"{theirs}.embed_positions.weight", c.context + OFFSET, C)[
                OFFSET:
            ]
        for part in ("weight", "bias"):
            if c.embed_norm:
                made[f"{prefix}embed_norm.{part}"] = given.take(f"{theirs}.layernorm_embedding.{part}", C)
            if c.norm_position == "pre":
                made[f"{ours}_norm.{part}"] = given.take(f"{theirs}.layer_norm.{part}", C)
            for i in range(layers):
                for name, parts in names.items():
                    rows = c.mlp_width if name == "mlp.up" else C
                    columns = () if part == "bias" or "norm" in name else (c.mlp_width if name == "mlp.down" else C,)
                    taken = [given.take(f"{theirs}.layers.{i}.{p}.{part}", rows, *columns) for p in parts]
                    made[f"{ours}.{i}.{name}.{part}"] = torch.cat(taken)
    # what is there twice (shared embeddings), zero (a bias), or computed (sinusoids)
    given.finish("embed_tokens.weight", "lm_head.weight", "final_logits_bias", "shared.weight",
                 *(() if learned else ("embed_positions.weight",)))  # fmt: skip
    return made


def _stacks(c: Any) -> tuple[tuple[str, str, int, dict[str, tuple[str, ...]]], ...]:
    return (
        ("encoder", "encoder", c.layers, _ENCODER),
        ("decoder", "decoder", c.decoder_layers or c.layers, _DECODER),
    )


def config_to_hf(c: Any, mlp_width: int) -> dict[str, Any]:
    """config.json of the BART, mBART or Marian that computes the same.

    Raises:
        ValueError: none does, or pad, bos or eos is not there; names the fields.
    """
    kinds = [
        kind for kind, family in FAMILIES.items()
        if all(getattr(c, n) in (v if isinstance(v, tuple) else (v,)) for n, v in family.items())
    ]  # fmt: skip
    back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if not kinds or c.activation not in back or c.norm_eps != 1e-5:
        got = {
            n: getattr(c, n) for n in ("norm_position", "positions", "embed_norm", "shared", "activation", "norm_eps")
        }
        raise ValueError(
            f"config fits none of {FAMILIES}, each with activation {', '.join(back)} and norm_eps 1e-5; got {got}"
        )
    for name in ("pad", "bos", "eos"):
        if getattr(c, name) is None:
            raise ValueError(
                f"{name} of the config must be an id, because transformers pads and generates by it; got None"
            )
    kind, attention_dropout = kinds[0], c.dropout if c.attention_dropout is None else c.attention_dropout
    apart = {} if kind != "marian" else {
        "share_encoder_decoder_embeddings": c.shared == "all", "decoder_vocab_size": c.vocab_size,
    }  # fmt: skip
    return apart | {
        "architectures": [CLASSES[kind]], "model_type": kind, "is_encoder_decoder": True,
        "vocab_size": c.source_vocab_size or c.vocab_size, "max_position_embeddings": c.context, "d_model": c.width,
        "encoder_layers": c.layers, "decoder_layers": c.decoder_layers or c.layers, "encoder_ffn_dim": mlp_width,
        "decoder_ffn_dim": mlp_width, "encoder_attention_heads": c.heads, "decoder_attention_heads": c.heads,
        "activation_function": back[c.activation], "scale_embedding": c.embed_scale, "dropout": c.dropout,
        "attention_dropout": attention_dropout, "activation_dropout": 0.0, "tie_word_embeddings": True,
        "pad_token_id": c.pad, "bos_token_id": c.bos, "decoder_start_token_id": c.bos, "eos_token_id": c.eos,
        "forced_eos_token_id": None,
    }  # fmt: skip


def state_to_hf(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformers model's state dict."""
    if c.shared == "target":
        made = {
            "model.decoder.embed_tokens.weight": state["embed.weight"],
            "model.encoder.embed_tokens.weight": state["source_embed.weight"],
        }
    else:
        made = {"model.shared.weight": state["embed.weight"]}
    bias = state["logits_bias"] if c.logits_bias else state["embed.weight"].new_zeros(c.vocab_size)
    made["final_logits_bias"] = bias[None]
    for ours, theirs, layers, names in _stacks(c):
        prefix = "source_" if theirs == "encoder" else ""
        if c.positions == "learned":
            rows = state[f"{prefix}positions.weight"]
            made[f"model.{theirs}.embed_positions.weight"] = torch.cat((rows.new_zeros(OFFSET, c.width), rows))
        for part in ("weight", "bias"):
            if c.embed_norm:
                made[f"model.{theirs}.layernorm_embedding.{part}"] = state[f"{prefix}embed_norm.{part}"]
            if c.norm_position == "pre":
                made[f"model.{theirs}.layer_norm.{part}"] = state[f"{ours}_norm.{part}"]
            for i in range(layers):
                for name, parts in names.items():
                    pieces = state[f"{ours}.{i}.{name}.{part}"].chunk(len(parts))
                    for p, piece in zip(parts, pieces, strict=True):
                        made[f"model.{theirs}.layers.{i}.{p}.{part}"] = piece
    return made
