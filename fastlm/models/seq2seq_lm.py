"""An encoder-decoder Transformer: as Vaswani et al. 2017 (arXiv:1706.03762), BART (Lewis et al. 2019,
arXiv:1910.13461), mBART or Marian, chosen by its config. B batch, T source length, S target length, C width,
V vocabulary.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.models._beam import beam_search
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
from fastlm.models._hf_bart import config_from_hf, config_to_hf, state_from_hf, state_to_hf
from fastlm.models._sampling import check_sampling, evaluating, sample
from fastlm.nn import DecoderBlock, Embedding, EncoderBlock, KVCache, LayerNorm, RotaryEmbedding
from fastlm.nn.functional import dropout
from fastlm.nn.mlp import ACTIVATIONS


@dataclass(frozen=True)
class Seq2SeqLMConfig:
    """Everything that shapes a Seq2SeqLM. A wrong value raises ValueError.

    >>> Seq2SeqLMConfig.bart(layers=3, heads=4, width=256, vocab_size=8000, context=128)
    """

    vocab_size: int
    """Of the target."""
    context: int
    """Most tokens of a source, and of a target."""
    layers: int
    """Of the encoder."""
    heads: int
    width: int
    decoder_layers: int | None = None
    """None: as many as layers."""
    source_vocab_size: int | None = None
    """None: the target's."""
    mlp_width: int | None = None
    """None: 4 * width, or 8/3 * width rounded up to a multiple of 64 for swiglu and geglu."""
    activation: str = "gelu"
    """gelu, gelu_tanh, relu, silu, swiglu or geglu."""
    norm_position: str = "post"
    """post (after each residual sum) or pre (before each branch, and once after the last block)."""
    norm_eps: float = 1e-5
    embed_norm: bool = False
    """A LayerNorm after the embeddings."""
    embed_scale: bool = False
    """The embeddings of tokens, not of positions, are multiplied by sqrt(width)."""
    positions: str = "learned"
    """learned, or sinusoidal: sin and cos of position * 10000^(-2 i / width), all sines before all cosines."""
    shared: str = "all"
    """all (source embedding, target embedding and head are one matrix), target (the latter two) or none."""
    logits_bias: bool = False
    """A constant is added to the logits, the final_logits_bias of BART and Marian. It is not trained."""
    dropout: float = 0.0
    attention_dropout: float | None = None
    """Of attention weights; None: dropout."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary in training mode (Vaswani et al. 5.4)."""
    pad: int | None = None
    """Id that fills up a source and is never generated; pad, bos and eos are what generate() and to_hf() go by."""
    bos: int | None = None
    """Id the decoder starts from."""
    eos: int | None = None
    """Id a target ends with."""

    def __post_init__(self) -> None:
        optional = ("decoder_layers", "source_vocab_size", "mlp_width")
        check_sizes(self, "vocab_size", "context", "layers", "heads", "width", optional=optional)
        check_heads(self)
        check_choice(self, "activation", *ACTIVATIONS)
        check_choice(self, "norm_position", "post", "pre")
        check_choice(self, "positions", "learned", "sinusoidal")
        check_choice(self, "shared", "all", "target", "none")
        check_probability(self, "dropout", "label_smoothing")
        if self.attention_dropout is not None:
            check_probability(self, "attention_dropout")
        check_positive(self, "norm_eps")
        if self.shared == "all" and self.source_vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"shared='all' needs one vocabulary, got source_vocab_size={self.source_vocab_size}, "
                f"vocab_size={self.vocab_size}; shared='target' takes two"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"positions='sinusoidal' needs an even width, got {self.width}")
        for name in ("pad", "bos", "eos"):
            _check_id(name, getattr(self, name), self.vocab_size)

    @classmethod
    def base(cls, **changes: Any) -> Seq2SeqLMConfig:
        """The base model of Vaswani et al. 2017, 63 million parameters with a joint vocabulary, any field changed."""
        preset: dict[str, Any] = {
            "vocab_size": 37000, "context": 512, "layers": 6, "heads": 8, "width": 512, "activation": "relu",
            "positions": "sinusoidal", "embed_scale": True, "dropout": 0.1, "label_smoothing": 0.1,
        }  # fmt: skip
        return cls(**{**preset, **changes})

    @classmethod
    def bart(cls, **changes: Any) -> Seq2SeqLMConfig:
        """BART-base, 139 million parameters, and any field changed."""
        preset: dict[str, Any] = {
            "vocab_size": 50265, "context": 1024, "layers": 6, "heads": 12, "width": 768, "embed_norm": True,
            "dropout": 0.1, "pad": 1, "bos": 2, "eos": 2,
        }  # fmt: skip
        return cls(**{**preset, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Seq2SeqLMConfig:
        """The config of asdict() or of a config.json. Raises ValueError on unknown or missing names."""
        return config_from_dict(cls, values)


def _check_id(name: str, value: int | None, vocab_size: int) -> None:
    if value is not None and (not isinstance(value, int) or not 0 <= value < vocab_size):
        raise ValueError(f"{name} must be None or lie in 0 .. {vocab_size - 1}, got {value!r}")


class Seq2SeqAttention(NamedTuple):
    """A layer's weights each."""

    encoder: list[Tensor]
    """(B, H, T, T)"""
    decoder: list[Tensor]
    """(B, H, S, S)"""
    cross: list[Tensor]
    """(B, H, S, T)"""


class Seq2SeqLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None
    attention: Seq2SeqAttention | None = None
    """Where it was asked for."""


class Seq2SeqLM(SavedModel):
    """Encoder: embed the source -> blocks. Decoder: embed the target -> blocks that see the encoder's output -> head.

    Initialised as BART: weights normal with deviation 0.02, biases zero; with embed_scale the embeddings of tokens have
    the deviation 1 / sqrt(width).

    >>> model = Seq2SeqLM(Seq2SeqLMConfig.base())
    >>> model(source, tokens, targets, source_mask).loss.backward()
    """

    logits_bias: Tensor | None

    config_class = Seq2SeqLMConfig

    def __init__(self, config: Seq2SeqLMConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width)
        self.source_embed = None if c.shared == "all" else Embedding(c.source_vocab_size or c.vocab_size, c.width)
        learned = c.positions == "learned"
        self.source_positions = Embedding(c.context, c.width) if learned else None
        self.positions = Embedding(c.context, c.width) if learned else None
        self.sinusoids = None if learned else RotaryEmbedding(c.width)
        self.source_embed_norm = LayerNorm(c.width, c.norm_eps) if c.embed_norm else None
        self.embed_norm = LayerNorm(c.width, c.norm_eps) if c.embed_norm else None
        self.dropout = nn.Dropout(c.dropout)
        pre_norm = c.norm_position == "pre"
        block = (c.width, c.heads, c.mlp_width, c.activation, c.norm_eps, c.dropout, c.attention_dropout, pre_norm)
        self.encoder = nn.ModuleList(EncoderBlock(*block) for _ in range(c.layers))
        self.encoder_norm = LayerNorm(c.width, c.norm_eps) if pre_norm else None
        self.decoder = nn.ModuleList(DecoderBlock(*block) for _ in range(c.decoder_layers or c.layers))
        self.decoder_norm = LayerNorm(c.width, c.norm_eps) if pre_norm else None
        self.head = nn.Linear(c.width, c.vocab_size, bias=False) if c.shared == "none" else None
        self.register_buffer("logits_bias", torch.zeros(c.vocab_size) if c.logits_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every weight anew; logits_bias stays."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                tokens = module is self.embed or module is self.source_embed
                nn.init.normal_(
                    module.weight, std=self.config.width**-0.5 if tokens and self.config.embed_scale else 0.02
                )
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        reduction: str = "mean",
        return_attention: bool = False,
    ) -> Seq2SeqLMOutput:
        """Loss where there are targets, else logits.

        Args:
            source: (B, T) int64, T at most config.context.
            tokens: (B, S) int64, what the decoder has seen: bos and the target but its last, filled up on the right.
            targets: (B, S) int64, the token after each; -100 takes no part. The logits are then never held whole.
            source_mask: (B, T) bool, False for padding of the source; None: there is none.
            reduction: "mean" over the targets that take part, "sum", or "none" (B * S losses).
            return_attention: also the attention weights of every layer, O(T^2 + S^2) of memory, with a warning.

        Returns:
            Seq2SeqLMOutput(loss, None) or Seq2SeqLMOutput(None, logits (B, S, V)), with attention where asked for.

        Raises:
            TypeError, ValueError: a tensor has another dtype or shape, or lies outside its vocabulary.
        """
        check_tokens(tokens, self.config.context, self.config.vocab_size)
        if targets is not None:
            check_targets(targets, tokens.shape)
        maps = Seq2SeqAttention([], [], []) if return_attention else None
        memory = self.encode(source, source_mask, None if maps is None else maps.encoder)
        if source.shape[0] != tokens.shape[0]:
            raise ValueError(f"source must have the {tokens.shape[0]} rows of tokens, got {source.shape[0]}")
        x = self._decode(tokens, self._keys_values(memory), source_mask, maps=maps)
        if targets is None:
            return Seq2SeqLMOutput(None, self._logits(x), maps)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = ops.linear_cross_entropy(
            x.flatten(0, 1), self.head_weight, targets.flatten(), self.logits_bias,
            reduction=reduction, label_smoothing=smoothing,
        )  # fmt: skip
        return Seq2SeqLMOutput(loss, None, maps)

    def encode(self, source: Tensor, source_mask: Tensor | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """source (B, T) -> (B, T, C), what the decoder sees of it; maps is appended each layer's attention."""
        c = self.config
        check_tokens(source, c.context, c.source_vocab_size or c.vocab_size, "source")
        check_mask(source_mask, source, "source_mask")
        embed = self.embed if self.source_embed is None else self.source_embed
        x = self._embedded(source, embed, self.source_positions, self.source_embed_norm)
        for block in self.encoder:
            if maps is not None:
                layer = cast(EncoderBlock, block)
                maps.append(layer.attention.maps(layer.norm1(x) if layer.pre_norm else x, mask=source_mask))
            x = block(x, source_mask)
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def _keys_values(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [cast(DecoderBlock, block).cross.keys_values(memory) for block in self.decoder]

    def _decode(
        self,
        tokens: Tensor,
        keys_values: list[tuple[Tensor, Tensor]],
        source_mask: Tensor | None,
        caches: list[KVCache] | None = None,
        maps: Seq2SeqAttention | None = None,
    ) -> Tensor:
        """(N, S) -> (N, S, C). With caches the tokens follow those the caches hold; N as CrossAttention."""
        start = caches[0].length if caches else 0
        x = self._embedded(tokens, self.embed, self.positions, self.embed_norm, start)
        for i, block in enumerate(self.decoder):
            x = block(
                x, keys_values[i], source_mask, caches[i] if caches else None, maps and (maps.decoder, maps.cross)
            )
        return x if self.decoder_norm is None else self.decoder_norm(x)

    def _embedded(
        self, tokens: Tensor, embed: Embedding, positions: Embedding | None, norm: LayerNorm | None, start: int = 0
    ) -> Tensor:
        S = tokens.shape[1]
        x = embed(tokens)  # (N, S, C)
        if self.config.embed_scale:
            x = x * self.config.width**0.5
        if positions is not None:
            x = x + positions.weight[start : start + S]  # (S, C) over the batch
        else:
            assert self.sinusoids is not None
            cos, sin = self.sinusoids(S, start, tokens.device)
            x = x + torch.cat((sin, cos), -1).to(x.dtype)
        if norm is not None:
            x = norm(x)
        return dropout(x, self.dropout.p if self.dropout.training else 0.0)

    def _logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.head_weight, self.logits_bias)

    def generate(
        self,
        source: Tensor,
        max_new_tokens: int,
        *,
        source_mask: Tensor | None = None,
        bos: int | None = None,
        eos: int | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """The targets of the sources, (B, L) int64 without bos; after its eos a target is filled up with eos.

        None of them has the config's pad, unless that is eos too (Marian's, which nothing trained, would win).

        Args:
            source: (B, T) int64. source_mask: (B, T) bool, False for padding.
            max_new_tokens: 1 to config.context; fewer come when every target has come to eos.
            bos, eos: the decoder's first token and the one that ends a target; None: the config's.
            beams: above 1, beam search: of the hypotheses y it finds, the one with the largest
                log p(y) / len(y)^length_penalty, as transformers counts it under early_stopping="never".
            length_penalty: any finite number; above 0 longer targets gain.
            temperature, top_k, top_p, generator: for beams=1, as CausalLM.generate; temperature 0 takes the most
                probable token.
            use_cache: keep keys and values of earlier tokens instead of computing them again.

        Raises:
            TypeError, ValueError: an option out of its range, a tensor of another dtype or shape.
        """
        c = self.config
        check_sampling(temperature, top_k, top_p)
        ids = {name: getattr(c, name) if given is None else given for name, given in (("bos", bos), ("eos", eos))}
        for name, value in ids.items():
            if value is None:
                raise ValueError(f"{name} must be given, because the config has none")
            _check_id(name, value, c.vocab_size)
        if not 1 <= max_new_tokens <= c.context:
            raise ValueError(f"max_new_tokens must lie in 1 .. {c.context}, the context, got {max_new_tokens}")
        if not isinstance(beams, int) or not 1 <= beams <= c.vocab_size:
            raise ValueError(f"beams must be an integer in 1 .. {c.vocab_size}, the vocabulary, got {beams!r}")
        if not math.isfinite(length_penalty):
            raise ValueError(f"length_penalty must be finite, got {length_penalty}")
        if beams > 1 and (temperature, top_k, top_p) != (0.0, None, None):
            raise ValueError("temperature, top_k and top_p are for beams=1: beam search does not sample")
        pad = None if c.pad == ids["eos"] else c.pad
        with torch.no_grad(), evaluating(self):
            keys_values = self._keys_values(self.encode(source, source_mask))
            caches = [KVCache(max_new_tokens) for _ in self.decoder] if use_cache else None

            def step(seen: Tensor, rows: Tensor | None = None) -> Tensor:
                if caches and rows is not None:
                    for cache in caches:
                        cache.reorder(rows)
                new = seen[:, caches[0].length :] if caches else seen
                return self._logits(self._decode(new, keys_values, source_mask, caches)[:, -1])

            B = source.shape[0]
            if beams > 1:
                return beam_search(
                    step, B, beams, ids["bos"], ids["eos"], pad, max_new_tokens, length_penalty, source.device
                )
            seen = torch.full((B, 1), ids["bos"], device=source.device)
            ended = torch.zeros(B, dtype=torch.bool, device=source.device)
            for _ in range(max_new_tokens):
                logits = step(seen)
                if pad is not None:
                    logits[:, pad] = float("-inf")
                token = sample(logits, temperature, top_k, top_p, generator).masked_fill(ended, ids["eos"])
                ended |= token == ids["eos"]
                seen = torch.cat((seen, token.unsqueeze(1)), 1)
                if bool(ended.all()):
                    break
            return seen[:, 1:]

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of weights; without embeddings, those of tokens and positions are left out (a tied head with them)."""
        total = sum(p.numel() for p in self.parameters())
        tables = (self.embed, self.source_embed, self.source_positions, self.positions)
        return total if embeddings else total - sum(t.weight.numel() for t in tables if t is not None)

    def flops_per_token(self, source_length: int | None = None, target_length: int | None = None) -> int:
        """Floating-point operations of forward and backward per trained token, which is one of the target.

        6 per weight of a matrix product and position it is applied to, and 12 * width * length for every layer's
        attention, counted whole as if it were not causal (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The
        source's share is divided among the target's tokens.

        Args:
            source_length, target_length: of a pair; None: the context.
        """
        c = self.config
        T, S = source_length or c.context, target_length or c.context
        encoder = sum(p.numel() for p in self.encoder.parameters())
        crossing = sum(p.numel() for block in self.decoder for p in cast(DecoderBlock, block).cross.kv.parameters())
        decoder = sum(p.numel() for p in self.decoder.parameters()) - crossing + c.vocab_size * c.width
        attention = 12 * c.width * (c.layers * T * T + (c.decoder_layers or c.layers) * S * (S + T))
        return (6 * ((encoder + crossing) * T + decoder * S) + attention) // S

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | nn.Module) -> Seq2SeqLM:
        """The model that computes what a transformers BART, mBART or Marian does, in float32.

        Args:
            source: a folder that save_pretrained wrote (config.json, model.safetensors, in shards or whole), or a
                BartForConditionalGeneration, MBartForConditionalGeneration, MarianMTModel. transformers itself is not
                needed for a folder.

        Raises:
            FileNotFoundError: folder or file missing. TypeError: source is neither.
            ValueError: another family; a field or tensor that has no place here, by name.
        """
        values, state = read_model(source)
        config = Seq2SeqLMConfig(**config_from_hf(values, state))
        model = cls(config)
        model.load_state_dict(state_from_hf(config, state))
        return model

    def to_hf(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors as transformers' AutoModelForSeq2SeqLM.from_pretrained reads them.

        Raises:
            ValueError: the config is none of BART's, mBART's and Marian's, or lacks pad, bos or eos; names the fields.
            OSError: the folder cannot be written or the disk is full; what was there stays whole.
        """
        mlp = cast(DecoderBlock, self.decoder[0]).mlp
        write_model(
            folder, config_to_hf(self.config, mlp.down.in_features), state_to_hf(self.config, self.state_dict())
        )
