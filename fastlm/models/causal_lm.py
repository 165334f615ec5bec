"""A decoder-only Transformer: GPT-2 style (Radford et al. 2019) and Llama style (Touvron et al. 2023,
arXiv:2302.13971), chosen by its config. B batch, S length, C width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.models._check import (
    check_choice,
    check_heads,
    check_positive,
    check_probability,
    check_sizes,
    check_targets,
    check_tokens,
    config_from_dict,
)
from fastlm.models._files import SavedModel
from fastlm.models._hf import read_model, write_model
from fastlm.models._hf_causal import config_from_hf, config_to_hf, state_from_hf, state_to_hf
from fastlm.models._sampling import check_sampling, evaluating, sample
from fastlm.nn import Embedding, KVCache, RotaryEmbedding, TransformerBlock
from fastlm.nn.functional import dropout
from fastlm.nn.mlp import ACTIVATIONS
from fastlm.nn.transformer import make_norm


@dataclass(frozen=True)
class CausalLMConfig:
    """Everything that shapes a CausalLM. A wrong value raises ValueError.

    >>> CausalLMConfig.gpt2(layers=6, heads=6, width=384, context=256)
    """

    vocab_size: int
    context: int
    """Most tokens the model sees at once."""
    layers: int
    heads: int
    width: int
    kv_heads: int | None = None
    """Heads of keys and values, dividing heads; None: as many as heads."""
    mlp_width: int | None = None
    """None: 4 * width, or 8/3 * width rounded up to a multiple of 64 for swiglu and geglu."""
    activation: str = "gelu"
    """gelu, gelu_tanh, relu, silu, swiglu or geglu."""
    norm: str = "layer"
    """layer (LayerNorm) or rms (RMSNorm)."""
    norm_eps: float = 1e-5
    positions: str = "learned"
    """learned (an embedding added to the tokens') or rope (queries and keys rotated)."""
    rope_base: float = 10000.0
    bias: bool = True
    """Of projections and LayerNorm."""
    dropout: float = 0.0
    tied: bool = True
    """The head is the token embedding."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context", "layers", "heads", "width")
        check_sizes(self, *sizes, optional=("kv_heads", "mlp_width"))
        check_heads(self)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={self.kv_heads}, heads={self.heads}")
        check_choice(self, "activation", *ACTIVATIONS)
        check_choice(self, "norm", "layer", "rms")
        check_choice(self, "positions", "learned", "rope")
        if self.positions == "rope" and self.width // self.heads % 2:
            raise ValueError(f"positions='rope' needs an even width / heads, got {self.width} / {self.heads}")
        check_probability(self, "dropout")
        check_positive(self, "norm_eps", "rope_base")

    @classmethod
    def gpt2(cls, **changes: Any) -> CausalLMConfig:
        """GPT-2 with 124 million parameters, and any field changed."""
        preset: dict[str, Any] = {
            "vocab_size": 50257, "context": 1024, "layers": 12, "heads": 12, "width": 768, "activation": "gelu_tanh",
        }  # fmt: skip
        return cls(**{**preset, **changes})

    @classmethod
    def llama(cls, **changes: Any) -> CausalLMConfig:
        """TinyLlama's 1.1 billion parameters (Zhang et al. 2024, arXiv:2401.02385), and any field changed.

        A change of width, heads or activation without kv_heads or mlp_width returns these two to their defaults.
        """
        preset: dict[str, Any] = {
            "vocab_size": 32000, "context": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "width": 2048,
            "mlp_width": 5632, "activation": "swiglu", "norm": "rms", "positions": "rope", "bias": False, "tied": False,
        }  # fmt: skip
        if "heads" in changes:
            preset["kv_heads"] = None
        if "width" in changes or "activation" in changes:
            preset["mlp_width"] = None
        return cls(**{**preset, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CausalLMConfig:
        """The config of asdict() or of a config.json. Raises ValueError on unknown or missing names."""
        return config_from_dict(cls, values)


class CausalLMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None
    attention: list[Tensor] | None = None
    """The weights (B, H, S, S) of every layer, where they were asked for."""


class CausalLM(SavedModel):
    """embed -> blocks -> norm -> head.

    Initialised as GPT-2: weights normal with deviation 0.02, divided by sqrt(2 * layers) for the two projections of
    each block that write to the residual stream; biases zero.

    >>> model = CausalLM(CausalLMConfig.gpt2())
    >>> model(tokens, targets).loss.backward()
    """

    config_class = CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width)
        learned = c.positions == "learned"
        self.positions = Embedding(c.context, c.width) if learned else None
        self.rope = None if learned else RotaryEmbedding(c.width // c.heads, c.rope_base)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                c.width, c.heads, c.kv_heads, c.mlp_width, c.activation, c.norm, c.norm_eps, c.bias, c.dropout
            )
            for _ in range(c.layers)
        )
        self.norm = make_norm(c.norm, c.width, c.norm_eps, c.bias)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every weight anew."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith((".attention.out", ".mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "elementwise_affine"):
                cast(nn.LayerNorm, module).reset_parameters()

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        return_attention: bool = False,
    ) -> CausalLMOutput:
        """Loss where there are targets, else logits.

        Args:
            tokens: (B, S) int64, S at most config.context.
            targets: (B, S) int64, the token after each; -100 takes no part. The logits are then never held whole.
            reduction: "mean" over the targets that take part, "sum", or "none" (B * S losses).
            return_attention: also the attention weights of every layer, O(S^2) of memory, with a warning.

        Returns:
            CausalLMOutput(loss, None) or CausalLMOutput(None, logits (B, S, V)), with attention where asked for.

        Raises:
            TypeError, ValueError: tokens or targets have another dtype or shape, or lie outside the vocabulary.
        """
        check_tokens(tokens, self.config.context, self.config.vocab_size)
        maps: list[Tensor] | None = [] if return_attention else None
        if targets is None:
            x = self._hidden(tokens, maps=maps)
            return CausalLMOutput(None, nn.functional.linear(x, self.head_weight), maps)
        check_targets(targets, tokens.shape)
        x = self._hidden(tokens, maps=maps).flatten(0, 1)  # (B*S, C)
        loss = ops.linear_cross_entropy(x, self.head_weight, targets.flatten(), reduction=reduction)
        return CausalLMOutput(loss, None, maps)

    def _hidden(self, tokens: Tensor, caches: list[KVCache] | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """(B, S) -> (B, S, C), normalised. With caches the tokens follow those the caches hold; maps is appended
        each layer's attention weights."""
        S, start = tokens.shape[1], caches[0].length if caches else 0
        x = self.embed(tokens)  # (B, S, C)
        rope = None
        if self.positions is not None:
            x = x + self.positions.weight[start : start + S]  # (S, C) over the batch
        else:
            assert self.rope is not None
            rope = self.rope(S, start, tokens.device)
        x = dropout(x, self.dropout.p if self.dropout.training else 0.0)
        for i, block in enumerate(self.blocks):
            if maps is not None:
                layer = cast(TransformerBlock, block)
                maps.append(layer.attention.maps(layer.norm1(x), rope))
            x = block(x, rope, caches[i] if caches else None)
        return self.norm(x)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """The prompts and what follows them, (B, S + new); arguments as stream()."""
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        new = self.stream(tokens, max_new_tokens, **options, generator=generator, eos=eos, use_cache=use_cache)  # type: ignore[arg-type]
        return torch.cat([tokens, *(token.unsqueeze(1) for token in new)], 1)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yields the next token of every prompt, (B,) int64, one step at a time.

        The model sees at most the last config.context tokens. Beyond them every token is computed from that window
        anew: earlier keys and values would carry what has left it, and learned positions move.

        Args:
            tokens: (B, S) int64, prompts of one length, at least 1.
            max_new_tokens: steps, fewer when every sequence has come to eos.
            temperature: divides the logits; 0 takes the most probable token.
            top_k: sample among the k most probable. top_p: among the fewest whose probabilities add up to p.
            generator: source of randomness; None for torch's default.
            eos: token that ends a sequence; it is repeated until all have ended.
            use_cache: keep keys and values of earlier tokens instead of computing them again.

        Raises:
            ValueError: an option out of its range; before the first step.
        """
        c = self.config
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if eos is not None and not 0 <= eos < c.vocab_size:
            raise ValueError(f"eos must be None or lie in 0 .. {c.vocab_size - 1}, got {eos}")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be (B, S) with S at least 1, got {getattr(tokens, 'shape', tokens)}")
        check_tokens(tokens[:, -c.context :], c.context, c.vocab_size)

        def steps() -> Iterator[Tensor]:
            seen = tokens  # (B, S), growing
            caches = [KVCache(c.context) for _ in self.blocks] if use_cache else None
            ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for _ in range(max_new_tokens):
                with torch.no_grad(), evaluating(self):
                    if caches and (seen.shape[1] <= c.context):
                        x = self._hidden(seen[:, caches[0].length :], caches)  # the tokens the caches lack
                    else:
                        caches = None
                        x = self._hidden(seen[:, -c.context :])
                    logits = nn.functional.linear(x[:, -1], self.head_weight)  # (B, V)
                    token = sample(logits, temperature, top_k, top_p, generator)
                    if eos is not None:
                        token = token.masked_fill(ended, eos)
                        ended |= token == eos
                    seen = torch.cat((seen[:, -c.context :], token.unsqueeze(1)), 1)
                yield token
                if eos is not None and bool(ended.all()):
                    return

        return steps()

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of weights; without embeddings, those of tokens and positions are left out (a tied head with them)."""
        total = sum(p.numel() for p in self.parameters())
        tables = [self.embed] if self.positions is None else [self.embed, self.positions]
        return total if embeddings else total - sum(table.weight.numel() for table in tables)

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations of forward and backward per trained token at this length (None: the context).

        6 per weight of a matrix product, and 12 * layers * width * length for attention, counted whole as if it were
        not causal (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
        """
        c = self.config
        head = c.vocab_size * c.width if c.tied else 0  # an untied head is counted with the other weights
        length = c.context if length is None else length
        return 6 * (self.num_parameters(embeddings=False) + head) + 12 * c.layers * c.width * length

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | nn.Module) -> CausalLM:
        """The model that computes what a transformers GPT-2 or Llama (or Mistral without a window) does, in float32.

        Args:
            source: a folder that save_pretrained wrote (config.json, model.safetensors, in shards or whole), or a
                GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM. transformers itself is not needed for a folder.

        Raises:
            FileNotFoundError: folder or file missing. TypeError: source is neither.
            ValueError: another family; a field or tensor that has no place here, by name.
        """
        values, state = read_model(source)
        config = CausalLMConfig(**config_from_hf(values))
        model = cls(config)
        model.load_state_dict(state_from_hf(config, values, state))
        return model

    def to_hf(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors as transformers' AutoModelForCausalLM.from_pretrained reads them.

        Raises:
            ValueError: the config is neither a GPT-2's nor a Llama's; names the fields.
            OSError: the folder cannot be written or the disk is full; what was there stays whole.
        """
        target = config_to_hf(self.config)
        write_model(folder, target, state_to_hf(self.config, target, self.state_dict()))
