"""MaskedLM from and to transformers' BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification: names,
shapes, and what does not fit. BERT keeps q, k and v apart; here they are one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.models._hf import HFWeights, fields, require

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "silu": "silu", "swish": "silu"}  # fmt: skip
ARCHITECTURES = {"mlm": "BertForMaskedLM", "classify": "BertForSequenceClassification",
                 "tag": "BertForTokenClassification"}  # fmt: skip
HEADS = {**{name: head for head, name in ARCHITECTURES.items()}, "BertForPreTraining": "mlm", "BertModel": None}


def config_from_hf(config: dict[str, Any], head: str | None, classes: int | None) -> dict[str, Any]:
    """The fields of MaskedLMConfig.

    Args:
        head, classes: in place of the checkpoint's own; None keeps those.

    Raises:
        ValueError: another family, or a field that asks for what MaskedLM has not.
    """
    require(
        config, model_type=("bert",), hidden_act=tuple(ACTIVATIONS), position_embedding_type=("absolute",),
        is_decoder=(False,), add_cross_attention=(False,), pruned_heads=({}, None),
        tie_word_embeddings=(True,), classifier_dropout=(None, config.get("hidden_dropout_prob")),
        problem_type=(None, "single_label_classification"),
    )  # fmt: skip
    vocab, context, layers, heads, width, hidden = fields(
        config, "vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
        "intermediate_size",
    )  # fmt: skip
    own = own_head(config)
    if head is None and own is None:
        raise ValueError(f"head must be given: a {(config.get('architectures') or ['BertModel'])[0]} has none")
    if head in (None, own):
        head = own
        if head != "mlm":
            saved = len(config.get("id2label") or (0, 1))  # two where nothing is said, as in transformers
            if classes not in (None, saved):
                raise ValueError(f"classes must be None or {saved}, as in the checkpoint, got {classes}")
            classes = saved
            if head == "classify" and classes == 1:
                raise ValueError("id2label of the transformers config must have at least two labels: one is regression")
    return {
        "vocab_size": vocab, "context": context, "layers": layers, "heads": heads, "width": width,
        "mlp_width": hidden, "activation": ACTIVATIONS[config.get("hidden_act", "gelu")],
        "norm_eps": config.get("layer_norm_eps", 1e-12), "segments": config.get("type_vocab_size", 2),
        "dropout": float(config.get("hidden_dropout_prob", 0.1)),
        "attention_dropout": float(config.get("attention_probs_dropout_prob", 0.1)), "head": head, "classes": classes,
    }  # fmt: skip


def own_head(config: dict[str, Any]) -> str | None:
    """The head of the checkpoint, or None for BertModel.

    Raises:
        ValueError: another architecture.
    """
    name = (config.get("architectures") or ["BertModel"])[0]
    if name not in HEADS:
        raise ValueError(f"architectures of the transformers config must be one of {', '.join(HEADS)}, got {name!r}")
    return HEADS[name]


def _names(c: Any) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Our name, BERT's names (of parts stacked along the rows), shape of a part; the encoder's."""
    C, hidden = c.width, c.mlp_width or 4 * c.width
    tables = (
        ("embed", "word_embeddings", c.vocab_size), ("positions", "position_embeddings", c.context),
        ("segments", "token_type_embeddings", c.segments),
    )  # fmt: skip
    for ours, theirs, rows in tables:
        if rows:
            yield f"{ours}.weight", (f"embeddings.{theirs}.weight",), (rows, C)
    for part in ("weight", "bias"):
        yield f"norm.{part}", (f"embeddings.LayerNorm.{part}",), (C,)
    layers = (
        ("attention.qkv", tuple(f"attention.self.{name}" for name in ("query", "key", "value")), C, C),
        ("attention.out", ("attention.output.dense",), C, C),
        ("norm1", ("attention.output.LayerNorm",), C, None),
        ("mlp.up", ("intermediate.dense",), hidden, C),
        ("mlp.down", ("output.dense",), C, hidden),
        ("norm2", ("output.LayerNorm",), C, None),
    )
    for i in range(c.layers):
        for ours, parts, rows, columns in layers:
            names = tuple(f"encoder.layer.{i}.{name}" for name in parts)
            weight = (rows,) if columns is None else (rows, columns)
            yield f"blocks.{i}.{ours}.weight", tuple(f"{name}.weight" for name in names), weight
            yield f"blocks.{i}.{ours}.bias", tuple(f"{name}.bias" for name in names), (rows,)


def _head_names(c: Any) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The head's, likewise."""
    C = c.width
    if c.head == "mlm":
        pairs = (("transform.dense", "dense", (C, C)), ("transform.norm", "LayerNorm", (C,)))
        for ours, theirs, shape in pairs:
            yield f"{ours}.weight", (f"cls.predictions.transform.{theirs}.weight",), shape
            yield f"{ours}.bias", (f"cls.predictions.transform.{theirs}.bias",), (C,)
        yield "bias", ("cls.predictions.bias",), (c.vocab_size,)
        return
    if c.head == "classify":
        yield "pooler.weight", ("pooler.dense.weight",), (C, C)
        yield "pooler.bias", ("pooler.dense.bias",), (C,)
    yield "head.weight", ("classifier.weight",), (c.classes, C)
    yield "head.bias", ("classifier.bias",), (c.classes,)


def state_from_hf(c: Any, source: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MaskedLM's state dict; where the checkpoint's head is another, without what it lacks of the one wanted.

    Args:
        c: MaskedLMConfig.
        source: the transformers config.
        state: the transformers model's.

    Raises:
        ValueError: tensors are missing, too many, or of another shape.
    """
    old = {"gamma": "weight", "beta": "bias"}  # names in the files of 2018
    renamed = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        renamed[f"{stem}.{old.get(last, last)}"] = tensor
    given, made = HFWeights(renamed, "bert."), {}
    for ours, theirs, shape in _names(c):
        made[ours] = torch.cat([given.take(name, *shape) for name in theirs])
    same = own_head(source) == c.head
    for ours, theirs, shape in _head_names(c):
        if same or (ours.startswith("pooler") and theirs[0] in given):
            made[ours] = given.take(theirs[0], *shape)
    # The tied decoder; the head of next sentences and its pooler; a buffer of old files; another head.
    unused = ["predictions.decoder.weight", "predictions.decoder.bias", "pooler.dense.weight", "pooler.dense.bias",
              "seq_relationship.weight", "seq_relationship.bias", "embeddings.position_ids"]  # fmt: skip
    if not same:
        unused += ["classifier.weight", "classifier.bias", "predictions.bias", "transform.dense.weight",
                   "transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias"]  # fmt: skip
    given.finish(*unused)
    return made


def config_to_hf(c: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """config.json of the BERT that computes the same. Raises ValueError where the labels are not one a class."""
    attention = c.dropout if c.attention_dropout is None else c.attention_dropout
    back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    made = {
        "architectures": [ARCHITECTURES[c.head]], "model_type": "bert", "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "intermediate_size": c.mlp_width or 4 * c.width,
        "hidden_act": back[c.activation], "layer_norm_eps": c.norm_eps, "type_vocab_size": c.segments or 1,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": attention,
        "position_embedding_type": "absolute", "tie_word_embeddings": True, "pad_token_id": None,
    }  # fmt: skip
    if c.head != "mlm":
        labels = [f"LABEL_{i}" for i in range(c.classes)] if labels is None else list(labels)
        if len(labels) != c.classes:
            raise ValueError(f"labels must be {c.classes} names, one a class, got {len(labels)}")
        made["id2label"] = {str(i): label for i, label in enumerate(labels)}
        made["label2id"] = {label: i for i, label in enumerate(labels)}
    return made


def state_to_hf(c: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformers model's state dict."""
    made = {}
    for ours, theirs, _ in (*_names(c), *_head_names(c)):
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            made[name if name.startswith(("cls.", "classifier.")) else f"bert.{name}"] = part
    if not c.segments:  # BERT always adds one: of zeros
        made["bert.embeddings.token_type_embeddings.weight"] = state["embed.weight"].new_zeros(1, c.width)
    return made
