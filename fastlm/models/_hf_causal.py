"""CausalLM from and to transformers' GPT2LMHeadModel and LlamaForCausalLM: names, shapes, and what does not fit.

GPT-2 keeps its matrices transposed (Conv1D), Llama keeps q, k, v and gate, up apart; here they are one matrix each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.models._hf import HFWeights, fields, one_dropout, require
from fastlm.nn.mlp import default_hidden

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                    "silu": "silu"}  # fmt: skip


def config_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of CausalLMConfig.

    Raises:
        ValueError: another family, or a field that asks for what CausalLM has not.
    """
    require(config, model_type=("gpt2", "llama", "mistral"))
    return _gpt2_config(config) if config.get("model_type") == "gpt2" else _llama_config(config)


def _gpt2_config(config: dict[str, Any]) -> dict[str, Any]:
    require(
        config, activation_function=tuple(GPT2_ACTIVATIONS), scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
    )  # fmt: skip
    vocab, context, layers, heads, width = fields(config, "vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    return {
        "vocab_size": vocab, "context": context, "layers": layers, "heads": heads, "width": width,
        "mlp_width": config.get("n_inner"), "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": GPT2_ACTIVATIONS[config.get("activation_function", "gelu_new")],
        "dropout": one_dropout(config, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "tied": config.get("tie_word_embeddings", True),
    }  # fmt: skip


def _llama_config(config: dict[str, Any]) -> dict[str, Any]:
    vocab, context, layers, heads, width, hidden = fields(
        config, "vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
        "intermediate_size",
    )  # fmt: skip
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, transformers 4
    require(
        config, hidden_act=("silu",), head_dim=(None, width // heads), attention_bias=(False,), mlp_bias=(False,),
        sliding_window=(None,),
    )  # fmt: skip
    require(rope, rope_type=("default",), type=("default",), partial_rotary_factor=(1.0, None))
    return {
        "vocab_size": vocab, "context": context, "layers": layers, "heads": heads, "width": width,
        "kv_heads": config.get("num_key_value_heads"), "mlp_width": hidden, "activation": "swiglu", "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6), "positions": "rope", "bias": False,
        "rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "dropout": float(config.get("attention_dropout") or 0.0), "tied": config.get("tie_word_embeddings", False),
    }  # fmt: skip


def state_from_hf(c: Any, source: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CausalLM's state dict.

    Args:
        c: CausalLMConfig.
        source: the transformers config.
        state: the transformers model's.

    Raises:
        ValueError: tensors are missing, too many, or of another shape.
    """
    return _gpt2_state(c, state) if source.get("model_type") == "gpt2" else _llama_state(c, state)


def _gpt2_state(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    given, C = HFWeights(state, "transformer."), c.width
    hidden = c.mlp_width or 4 * C
    made = {"embed.weight": given.take("wte.weight", c.vocab_size, C)}
    made["positions.weight"] = given.take("wpe.weight", c.context, C)
    for i in range(c.layers):
        for ours, theirs in (("norm1", "ln_1"), ("norm2", "ln_2")):
            for part in ("weight", "bias"):
                made[f"blocks.{i}.{ours}.{part}"] = given.take(f"h.{i}.{theirs}.{part}", C)
        for ours, theirs, rows, columns in (
            ("attention.qkv", "attn.c_attn", C, 3 * C), ("attention.out", "attn.c_proj", C, C),
            ("mlp.up", "mlp.c_fc", C, hidden), ("mlp.down", "mlp.c_proj", hidden, C),
        ):  # fmt: skip
            made[f"blocks.{i}.{ours}.weight"] = given.take(f"h.{i}.{theirs}.weight", rows, columns).t()
            made[f"blocks.{i}.{ours}.bias"] = given.take(f"h.{i}.{theirs}.bias", columns)
    for part in ("weight", "bias"):
        made[f"norm.{part}"] = given.take(f"ln_f.{part}", C)
    return _head(c, given, made, ".attn.bias", ".attn.masked_bias")  # buffers of old files: the causal mask


def _llama_state(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    given, C = HFWeights(state, "model."), c.width
    kv = (c.kv_heads or c.heads) * (C // c.heads)
    made = {"embed.weight": given.take("embed_tokens.weight", c.vocab_size, C)}
    for i in range(c.layers):
        layer, block = f"layers.{i}", f"blocks.{i}"
        made[f"{block}.norm1.weight"] = given.take(f"{layer}.input_layernorm.weight", C)
        made[f"{block}.norm2.weight"] = given.take(f"{layer}.post_attention_layernorm.weight", C)
        qkv = (("q", C), ("k", kv), ("v", kv))
        made[f"{block}.attention.qkv.weight"] = torch.cat(
            [given.take(f"{layer}.self_attn.{name}_proj.weight", rows, C) for name, rows in qkv]
        )
        made[f"{block}.attention.out.weight"] = given.take(f"{layer}.self_attn.o_proj.weight", C, C)
        made[f"{block}.mlp.up.weight"] = torch.cat(
            [given.take(f"{layer}.mlp.{name}_proj.weight", c.mlp_width, C) for name in ("gate", "up")]
        )
        made[f"{block}.mlp.down.weight"] = given.take(f"{layer}.mlp.down_proj.weight", C, c.mlp_width)
    made["norm.weight"] = given.take("norm.weight", C)
    return _head(c, given, made, "rotary_emb.inv_freq")


def _head(c: Any, given: HFWeights, made: dict[str, Tensor], *ignored: str) -> dict[str, Tensor]:
    if not c.tied:
        made["head.weight"] = given.take("lm_head.weight", c.vocab_size, c.width)
    elif "lm_head.weight" in given:  # a live model's state dict names it twice
        given.take("lm_head.weight", c.vocab_size, c.width)
    given.finish(*ignored)
    return made


def config_to_hf(c: Any) -> dict[str, Any]:
    """config.json of the GPT-2 or Llama that computes the same.

    Raises:
        ValueError: neither does; names the fields.
    """
    gpt2 = {"norm": "layer", "positions": "learned", "activation": tuple(dict.fromkeys(GPT2_ACTIVATIONS.values()))}
    llama = {"norm": "rms", "positions": "rope", "activation": ("swiglu",), "bias": False}
    if _fits(c, gpt2) and c.kv_heads in (None, c.heads):
        back = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
            "n_positions": c.context, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads,
            "n_inner": c.mlp_width, "activation_function": back[c.activation], "layer_norm_epsilon": c.norm_eps,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
            "tie_word_embeddings": c.tied, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
    if _fits(c, llama):
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context, "hidden_size": c.width, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads or c.heads,
            "head_dim": c.width // c.heads, "intermediate_size": _hidden_width(c), "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base,
            "rope_parameters": {"rope_theta": c.rope_base, "rope_type": "default"}, "attention_bias": False,
            "mlp_bias": False, "attention_dropout": c.dropout, "tie_word_embeddings": c.tied, "bos_token_id": None,
            "eos_token_id": None,
        }  # fmt: skip
    raise ValueError(
        f"config fits neither GPT-2 ({_say(gpt2)}, kv_heads=None) nor Llama ({_say(llama)}): got norm={c.norm!r}, "
        f"positions={c.positions!r}, activation={c.activation!r}, bias={c.bias}, kv_heads={c.kv_heads}"
    )


def _fits(c: Any, wanted: dict[str, Any]) -> bool:
    return all(getattr(c, name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items())


def _say(wanted: dict[str, Any]) -> str:
    return ", ".join(f"{name}={'|'.join(v) if isinstance(v, tuple) else v!r}" for name, v in wanted.items())


def _hidden_width(c: Any) -> int:
    """Width between the two products of the MLP."""
    return int(c.mlp_width or default_hidden(c.width, c.activation))


def state_to_hf(c: Any, target: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformers model's state dict; target is config_to_hf(c)."""
    return _to_gpt2(c, state) if target["model_type"] == "gpt2" else _to_llama(c, state)


def _to_gpt2(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    def bias(name: str, size: int) -> Tensor:  # GPT-2 has every bias: one that is not here is zero
        return state[name] if name in state else state["embed.weight"].new_zeros(size)

    made = {"transformer.wte.weight": state["embed.weight"], "transformer.wpe.weight": state["positions.weight"]}
    for i in range(c.layers):
        h, block = f"transformer.h.{i}", f"blocks.{i}"
        for theirs, ours in (("ln_1", "norm1"), ("ln_2", "norm2")):
            made[f"{h}.{theirs}.weight"] = state[f"{block}.{ours}.weight"]
            made[f"{h}.{theirs}.bias"] = bias(f"{block}.{ours}.bias", c.width)
        for theirs, ours in (
            ("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out"), ("mlp.c_fc", "mlp.up"),
            ("mlp.c_proj", "mlp.down"),
        ):  # fmt: skip
            weight = state[f"{block}.{ours}.weight"]
            made[f"{h}.{theirs}.weight"] = weight.t()
            made[f"{h}.{theirs}.bias"] = bias(f"{block}.{ours}.bias", weight.shape[0])
    made["transformer.ln_f.weight"] = state["norm.weight"]
    made["transformer.ln_f.bias"] = bias("norm.bias", c.width)
    if not c.tied:
        made["lm_head.weight"] = state["head.weight"]
    return made


def _to_llama(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    kv = (c.kv_heads or c.heads) * (c.width // c.heads)
    made = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(c.layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        made[f"{layer}.input_layernorm.weight"] = state[f"{block}.norm1.weight"]
        made[f"{layer}.post_attention_layernorm.weight"] = state[f"{block}.norm2.weight"]
        parts = state[f"{block}.attention.qkv.weight"].split((c.width, kv, kv))
        for name, part in zip("qkv", parts, strict=True):
            made[f"{layer}.self_attn.{name}_proj.weight"] = part
        made[f"{layer}.self_attn.o_proj.weight"] = state[f"{block}.attention.out.weight"]
        for name, part in zip(("gate", "up"), state[f"{block}.mlp.up.weight"].chunk(2), strict=True):
            made[f"{layer}.mlp.{name}_proj.weight"] = part
        made[f"{layer}.mlp.down_proj.weight"] = state[f"{block}.mlp.down.weight"]
    if not c.tied:
        made["lm_head.weight"] = state["head.weight"]
    return made
