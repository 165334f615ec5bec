"""Programs in the shape of PyTorch's Transformer tutorials, run with torch.nn and with fastlm.nn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm.nn.functional
from fastlm import nn
from tests.nn.beside_torch import close

PAD, BOS, EOS = 0, 1, 2


def positions(nn: Any, width: int, dropout: float, longest: int = 64) -> Any:
    class PositionalEncoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(p=dropout)
            steps = torch.arange(longest).unsqueeze(1)
            rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
            table = torch.zeros(longest, 1, width)
            table[:, 0, 0::2], table[:, 0, 1::2] = torch.sin(steps * rates), torch.cos(steps * rates)
            self.register_buffer("table", table)

        def forward(self, x: Tensor) -> Tensor:  # (length, batch, width)
            return self.dropout(x + self.table[: x.shape[0]])

    return PositionalEncoding()


def language_model(nn: Any, F: Any, dropout: float) -> list[float]:
    """A causal TransformerEncoder over the next token, as in "Language Modeling with nn.Transformer"."""

    class TransformerModel(nn.Module):
        def __init__(self, tokens: int, width: int, heads: int, hidden: int, layers: int) -> None:
            super().__init__()
            self.width = width
            self.positions = positions(nn, width, dropout)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, hidden, dropout), layers)
            self.embedding = nn.Embedding(tokens, width)
            self.head = nn.Linear(width, tokens)
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
            nn.init.uniform_(self.head.weight, -0.1, 0.1)
            nn.init.zeros_(self.head.bias)

        def forward(self, source: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(source.shape[0])
            x = self.positions(self.embedding(source) * math.sqrt(self.width))
            return F.log_softmax(self.head(self.encoder(x, mask)), dim=-1)

    torch.manual_seed(0)
    text = torch.randint(0, 50, (40, 4)).cumsum(0) % 50
    model, losses = TransformerModel(50, 32, 4, 64, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for start in (0, 13, 26) * 2:
        data, target = text[start : start + 13], text[start + 1 : start + 14].reshape(-1)
        loss = F.nll_loss(model(data).view(-1, 50), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        losses.append(F.nll_loss(model(text[:-1]).view(-1, 50), text[1:].reshape(-1)).item())
    return losses


def translation(nn: Any, F: Any, dropout: float) -> list[float]:
    """nn.Transformer over padded pairs, then greedy decoding, as in "Language Translation with nn.Transformer"."""

    class Seq2SeqTransformer(nn.Module):
        def __init__(self, width: int, tokens: int) -> None:
            super().__init__()
            self.transformer = nn.Transformer(
                d_model=width, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=64, dropout=dropout
            )
            self.head = nn.Linear(width, tokens)
            self.source, self.target = nn.Embedding(tokens, width), nn.Embedding(tokens, width)
            self.positions = positions(nn, width, dropout)

        def forward(self, source: Tensor, target: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
            source_mask, target_mask, source_padding, target_padding = masks
            x, y = self.positions(self.source(source)), self.positions(self.target(target))
            out = self.transformer(
                x, y, source_mask, target_mask, None, source_padding, target_padding, source_padding
            )  # fmt: skip
            return self.head(out)

        def encode(self, source: Tensor) -> Tensor:
            return self.transformer.encoder(self.positions(self.source(source)), None)

        def decode(self, target: Tensor, memory: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[0]).isinf()
            return self.head(self.transformer.decoder(self.positions(self.target(target)), memory, mask))

    torch.manual_seed(0)
    lengths = [9, 5, 7, 3]
    source = [torch.cat([torch.randint(3, 40, (n,)), torch.tensor([EOS])]) for n in lengths]
    target = [torch.cat([torch.tensor([BOS]), s.flip(0)[1:], torch.tensor([EOS])]) for s in source]
    x, y = (nn.utils.rnn.pad_sequence(batch, padding_value=PAD) for batch in (source, target))
    model, losses = Seq2SeqTransformer(32, 40), []
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    masks = (
        torch.zeros(x.shape[0], x.shape[0], dtype=torch.bool),
        nn.Transformer.generate_square_subsequent_mask(y.shape[0] - 1),
        (x == PAD).T,
        (y[:-1] == PAD).T,
    )
    for _ in range(6):
        logits = model(x, y[:-1], masks)
        loss = criterion(logits.reshape(-1, logits.shape[-1]), y[1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        memory, words = model.encode(x[:, :1]), torch.tensor([[BOS]])
        for _ in range(4):
            scores = model.decode(words, memory)[-1]
            losses.append(scores.max().item())
            words = torch.cat([words, scores.argmax(-1, keepdim=True)])
    return losses


@pytest.mark.parametrize("program", [language_model, translation])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
def test_the_same_program_gives_the_same_losses(program: Any) -> None:
    found, expected = program(nn, fastlm.nn.functional, 0.0), program(torch.nn, torch.nn.functional, 0.0)
    close(torch.tensor(found), torch.tensor(expected))
    assert found[5] < found[0]


@pytest.mark.parametrize("program", [language_model, translation])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
def test_with_dropout_it_learns_as_well(program: Any) -> None:
    found, expected = program(nn, fastlm.nn.functional, 0.1), program(torch.nn, torch.nn.functional, 0.1)
    assert all(abs(a - b) < 0.35 for a, b in zip(found[:6], expected[:6], strict=True))
    assert found[5] < found[0]


def test_a_masked_transformer_compiles_into_one_graph() -> None:
    """Torch's own looks at the mask's values for causality, which breaks the graph."""
    torch._dynamo.reset()
    model = nn.Transformer(32, 4, 1, 1, 64, 0.1, "gelu", batch_first=True)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    source, target = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 5, 32)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": padding, "memory_key_padding_mask": padding,
    }  # fmt: skip
    found = []
    for module in (model, whole):
        torch.manual_seed(1)
        out = module(source, target, **masks)
        found.append([out, *torch.autograd.grad(out.square().sum(), source)])
    for a, b in zip(*found, strict=True):
        close(a, b)
