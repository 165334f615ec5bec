"""A Transformer encoder in the style of BERT (Devlin et al. 2019, arXiv:1810.04805) with one of three heads: words that
were masked, a class for the text, a tag for each token. B batch, S length, C width, V vocabulary, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.models._check import (
    check_choice,
    check_heads,
    check_mask,
    check_positive,
    check_probability,
    check_sizes,
    check_targets,
    check_tokens,
    config_from_dict,
)
from fastlm.models._files import SavedModel
from fastlm.models._hf import read_model, write_model
from fastlm.models._hf_bert import config_from_hf, config_to_hf, state_from_hf, state_to_hf
from fastlm.nn import Embedding, EncoderBlock, LayerNorm
from fastlm.nn.functional import dropout
from fastlm.nn.mlp import ACTIVATIONS, GATED

IGNORE = -100
HEAD = ("transform.", "bias", "pooler.", "head.")
MASKED = 0.15  # of the positions, as Devlin et al. mask them: what the head of "mlm" is computed for


@dataclass(frozen=True)
class MaskedLMConfig:
    """Everything that shapes a MaskedLM. A wrong value raises ValueError.

    >>> MaskedLMConfig.bert(layers=4, heads=4, width=256, head="classify", classes=2)
    """

    vocab_size: int
    context: int
    """Most tokens the model sees at once."""
    layers: int
    heads: int
    width: int
    mlp_width: int | None = None
    """None: 4 * width."""
    activation: str = "gelu"
    """gelu, gelu_tanh, relu or silu."""
    norm_eps: float = 1e-12
    segments: int = 0
    """Kinds of text that an embedding tells apart, 2 for pairs; 0: no such embedding."""
    dropout: float = 0.0
    attention_dropout: float | None = None
    """Of attention weights; None: as dropout."""
    head: str = "mlm"
    """mlm (the masked tokens), classify (the whole text, read from the first token) or tag (each token)."""
    classes: int | None = None
    """Of classify and tag."""
    class_weights: tuple[float, ...] | None = None
    """Factors of each class's loss, for classes of unequal size. None: 1."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context", "layers", "heads", "width", optional=("mlp_width", "classes"))
        check_heads(self)
        check_choice(self, "activation", *(name for name in ACTIVATIONS if name not in GATED))
        check_choice(self, "head", "mlm", "classify", "tag")
        check_probability(self, "dropout", *["attention_dropout"] * (self.attention_dropout is not None))
        check_positive(self, "norm_eps")
        if not isinstance(self.segments, int) or self.segments < 0:
            raise ValueError(f"segments must be an integer of at least 0, got {self.segments!r}")
        if self.head == "mlm":
            for name in ("classes", "class_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be None with the head mlm, got {getattr(self, name)!r}")
        elif self.classes is None:
            raise ValueError(f"classes must be an integer of at least 1 with the head {self.head}, got None")
        if self.class_weights is not None:
            weights = tuple(float(weight) for weight in self.class_weights)
            if len(weights) != self.classes or not all(0 <= weight < float("inf") for weight in weights):
                raise ValueError(f"class_weights must be {self.classes} finite numbers of at least 0, got {weights}")
            object.__setattr__(self, "class_weights", weights)

    @classmethod
    def bert(cls, **changes: Any) -> MaskedLMConfig:
        """BERT base with 110 million parameters, and any field changed."""
        preset: dict[str, Any] = {
            "vocab_size": 30522, "context": 512, "layers": 12, "heads": 12, "width": 768, "segments": 2, "dropout": 0.1,
        }  # fmt: skip
        return cls(**{**preset, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MaskedLMConfig:
        """The config of asdict() or of a config.json. Raises ValueError on unknown or missing names."""
        return config_from_dict(cls, values)


class MaskedLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None
    attention: list[Tensor] | None = None
    """A layer's weights (B, H, S, S) each, where they were asked for."""


class _Transform(nn.Module):
    """norm(activation(dense(x))): what stands between the encoder and the words."""

    def __init__(self, width: int, activation: str, eps: float) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), LayerNorm(width, eps)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.activation(self.dense(x))))


class MaskedLM(SavedModel):
    """embed -> norm -> blocks -> head.

    mlm: the words' own embedding, after a dense layer, is the head. classify: tanh(dense(first token)), then a linear
    layer. tag: a linear layer. Initialised as BERT: weights normal with deviation 0.02, biases zero.

    >>> model = MaskedLM(MaskedLMConfig.bert())
    >>> model(tokens, targets, mask).loss.backward()
    """

    config_class = MaskedLMConfig

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width)
        self.positions = Embedding(c.context, c.width)
        self.segments = Embedding(c.segments, c.width) if c.segments else None
        self.norm = LayerNorm(c.width, c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                c.width, c.heads, c.mlp_width, c.activation, c.norm_eps, c.dropout, c.attention_dropout,
            )
            for _ in range(c.layers)
        )  # fmt: skip
        self.transform = _Transform(c.width, c.activation, c.norm_eps) if c.head == "mlm" else None
        self.bias = nn.Parameter(torch.empty(c.vocab_size)) if c.head == "mlm" else None
        self.pooler = nn.Linear(c.width, c.width) if c.head == "classify" else None
        self.head = None if c.classes is None else nn.Linear(c.width, c.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every weight anew."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        reduction: str = "mean",
        return_attention: bool = False,
    ) -> MaskedLMOutput:
        """Loss where there are targets; logits where there are none, and with the heads classify and tag always.

        Args:
            tokens: (B, S) int64, S at most config.context.
            targets: int64; mlm and tag: (B, S), what stands or belongs at each position; classify: (B,), the classes.
                -100 takes no part. With mlm the head is computed for the positions that have a target alone.
            mask: (B, S) bool, True for tokens, False for padding, which no token sees; None: there is no padding.
            segments: (B, S) int64 below config.segments; None: all are 0.
            reduction: "mean" over the targets that take part (weighted where there are class_weights, as
                torch.nn.CrossEntropyLoss), "sum", or "none" (a loss for each target, 0 where it takes no part).
            return_attention: also the attention weights of every layer, O(S^2) of memory, with a warning.

        Returns:
            MaskedLMOutput(loss, logits): logits (B, S, V) for mlm, (B, K) for classify, (B, S, K) for tag; and
            attention where asked for.

        Raises:
            TypeError, ValueError: a tensor has another dtype or shape, or lies outside the vocabulary.
        """
        c = self.config
        if targets is not None:
            check_tokens(tokens, c.context, c.vocab_size)
            check_targets(targets, tokens.shape[:1] if c.head == "classify" else tokens.shape)
        maps: list[Tensor] | None = [] if return_attention else None
        x = self.encode(tokens, mask, segments, maps)  # (B, S, C)
        if self.head is None:
            assert self.transform is not None and self.bias is not None
            if targets is None:
                return MaskedLMOutput(None, nn.functional.linear(self.transform(x), self.embed.weight, self.bias), maps)
            return MaskedLMOutput(self._masked_loss(x, targets, reduction), None, maps)
        p = self.dropout.p if self.dropout.training else 0.0
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x[:, 0]))  # (B, C)
        logits = self.head(dropout(x, p))
        if targets is None:
            return MaskedLMOutput(None, logits, maps)
        weights = None if c.class_weights is None else torch.tensor(c.class_weights, device=x.device)
        loss = ops.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), weight=weights, ignore_index=IGNORE, reduction=reduction
        )
        return MaskedLMOutput(loss, logits, maps)

    def encode(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """The encoder's last states, (B, S, C); arguments as forward(); maps is appended each layer's attention."""
        c = self.config
        check_tokens(tokens, c.context, c.vocab_size)
        check_mask(mask, tokens)
        added = self.positions.weight[: tokens.shape[1]]  # (S, C), over the batch
        if segments is not None:
            if self.segments is None:
                raise ValueError("segments must be None: the config has segments=0")
            check_tokens(segments, c.context, c.segments, "segments")
            if segments.shape != tokens.shape:
                raise ValueError(f"segments must be {tuple(tokens.shape)} like tokens, got {tuple(segments.shape)}")
            added = added + self.segments(segments)
        elif self.segments is not None:
            added = added + self.segments.weight[0]
        x = dropout(self.norm(self.embed(tokens) + added), self.dropout.p if self.dropout.training else 0.0)
        for block in self.blocks:
            if maps is not None:
                maps.append(cast(EncoderBlock, block).attention.maps(x, mask=mask))
            x = block(x, mask)
        return x

    def _masked_loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Of the rows that have a target alone: the head is half of a small model's work, and they are one in seven.

        On an accelerator their count is waited for.
        """
        assert self.transform is not None and self.bias is not None
        targets = targets.flatten()
        rows = (targets != IGNORE).nonzero().squeeze(1)  # (M,)
        hidden = self.transform(x.flatten(0, 1).index_select(0, rows))
        loss = ops.linear_cross_entropy(hidden, self.embed.weight, targets[rows], self.bias, reduction=reduction)
        return loss if reduction != "none" else loss.new_zeros(targets.shape).index_copy(0, rows, loss)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of weights; without embeddings, those of tokens (mlm's head with them), positions and segments are
        left out."""
        total = sum(p.numel() for p in self.parameters())
        tables = [table for table in (self.embed, self.positions, self.segments) if table is not None]
        return total if embeddings else total - sum(table.weight.numel() for table in tables)

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations of forward and backward per token read at this length (None: the context).

        6 per weight of a matrix product, and 12 * layers * width * length for attention (Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B). The head of mlm counts for the 15 % of tokens that are masked.
        """
        c = self.config
        length = c.context if length is None else length
        blocks = sum(p.numel() for p in self.blocks.parameters())
        if c.head == "mlm":
            head = MASKED * (c.vocab_size + c.width) * c.width
        else:
            assert c.classes is not None
            head = (c.width + c.classes) * c.width / length if c.head == "classify" else c.classes * c.width
        return 6 * (blocks + round(head)) + 12 * c.layers * c.width * length

    def with_head(self, head: str, classes: int | None = None) -> MaskedLM:
        """A model with a copy of this encoder and a new head: fine-tuning after pretraining."""
        model = MaskedLM(replace(self.config, head=head, classes=classes, class_weights=None))
        encoder = {name: t for name, t in self.state_dict().items() if not name.startswith(HEAD)}
        model.load_state_dict(encoder, strict=False)
        return model.to(self.embed.weight.device)

    @classmethod
    def from_hf(
        cls, source: str | os.PathLike[str] | nn.Module, *, head: str | None = None, classes: int | None = None
    ) -> MaskedLM:
        """The model that computes what a transformers BERT does, in float32.

        Args:
            source: a folder that save_pretrained wrote (config.json, model.safetensors, in shards or whole), or a
                BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertForTokenClassification or
                BertModel. transformers itself is not needed for a folder.
            head, classes: None: those of the checkpoint. Another head is initialised anew, but for a pooler that is
                there.

        Raises:
            FileNotFoundError: folder or file missing. TypeError: source is neither.
            ValueError: another family; a field or tensor that has no place here, by name; a BertModel without head.
        """
        values, state = read_model(source)
        config = MaskedLMConfig(**config_from_hf(values, head, classes))
        model = cls(config)
        model.load_state_dict({**model.state_dict(), **state_from_hf(config, values, state)})
        return model

    def to_hf(self, folder: str | os.PathLike[str], labels: Sequence[str] | None = None) -> None:
        """Writes config.json and model.safetensors as transformers' AutoModelForMaskedLM,
        AutoModelForSequenceClassification or AutoModelForTokenClassification reads them, by the head.

        Args:
            labels: names of the classes; None: LABEL_0, LABEL_1 ...

        Raises:
            ValueError: not one label for each class.
            OSError: the folder cannot be written or the disk is full; what was there stays whole.
        """
        write_model(folder, config_to_hf(self.config, labels), state_to_hf(self.config, self.state_dict()))
