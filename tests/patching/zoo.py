"""Small PyTorch models as people write them. Each returns (loss, logits) of the inputs that inputs(name) gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB, WIDTH, PAD = 96, 32, 0


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(32, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class Translator(nn.Module):
    """The tutorial's model around torch.nn.Transformer: post-norm, ReLU, three padding masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = Embeddings(), Embeddings()
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(WIDTH, VOCAB)
        self.criterion = nn.CrossEntropyLoss(ignore_index=PAD)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(targets.shape[1])
        padding = (tokens == PAD).to(causal.dtype).masked_fill(tokens == PAD, -torch.inf)
        hidden = self.transformer(
            self.source(tokens), self.target(targets), tgt_mask=causal, src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )  # fmt: skip
        logits = self.generator(hidden)
        return self.criterion(logits.flatten(0, 1), targets.roll(-1, 1).flatten()), logits


class LanguageModel(nn.Module):
    """The tutorial's model around torch.nn.TransformerEncoder, sequence first, with GELU and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.encoder(self.embeddings(tokens).transpose(0, 1), mask, is_causal=True)
        logits = self.head(hidden.transpose(0, 1))
        return self.criterion(logits.transpose(1, 2), targets), logits


class Classifier(nn.Module):
    """A pre-norm encoder of padded sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, nn.GELU(), batch_first=True,
                                           norm_first=True)  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        padding = tokens == PAD
        hidden = self.norm(self.encoder(self.embeddings(tokens), src_key_padding_mask=padding))
        logits = self.head(hidden.masked_fill(padding.unsqueeze(-1), 0.0).sum(1))
        return self.criterion(logits, targets[:, 0] % 3), logits


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, 80, bias=False)
        self.w2 = nn.Linear(80, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, 80, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """A user's own decoder: RMSNorm, SwiGLU, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.blocks = nn.ModuleList(LlamaBlock() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embeddings.tokens.weight
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embeddings(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return self.criterion(logits.flatten(0, 1), targets.flatten()), logits


class MLPBlock(nn.Sequential):
    """As torchvision's: a Sequential with a constructor of its own."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.0), nn.Linear(64, WIDTH), nn.Dropout(0.0)
        )  # fmt: skip


class ChannelNorm(nn.LayerNorm):
    """As ConvNeXt's: a subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = MLPBlock()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """torchvision's vision transformer, with a ConvNeXt norm at its stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), ChannelNorm(WIDTH))
        self.blocks = nn.ModuleList(ViTBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 10)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x).mean(1))
        return self.criterion(logits, targets[:, 0] % 10), logits


class FunctionalMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class OwnTransformer(nn.Module):
    """Attention by hand with an in-and-out projection, GEGLU with one packed product and a functional GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp, self.geglu = FunctionalMLP(), PackedGEGLU()
        self.head = nn.Linear(WIDTH, VOCAB)
        self.criterion = nn.CrossEntropyLoss(reduction="sum")

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embeddings(tokens)
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) * WIDTH**-0.5, -1) @ v)
        x = x + self.mlp(self.norms[1](x))
        logits = self.head(x + self.geglu(self.norms[2](x)))
        return self.criterion(logits.flatten(0, 1), targets.flatten()), logits


class PackedGEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.act = nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.outer(value * self.act(gate))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "translator": Translator,
    "language model": LanguageModel,
    "classifier": Classifier,
    "llama": Llama,
    "vit": ViT,
    "own transformer": OwnTransformer,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def inputs(name: str, B: int = 3, S: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, VOCAB, (B, S), generator=generator)
    targets = torch.randint(1, VOCAB, (B, S), generator=generator)
    if name in ("translator", "classifier"):
        tokens[0, S - 3 :] = PAD
        tokens[1, S - 1 :] = PAD
    return (torch.randn(B, 3, 8, 8, generator=generator) if name == "vit" else tokens), targets


class Calls(TorchDispatchMode):
    """The names of fastlm's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastlm":
            self.seen.append(func._schema.name.removeprefix("fastlm::"))
        return func(*args, **(kwargs or {}))
