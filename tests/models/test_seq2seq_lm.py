"""Seq2SeqLM: what its options compute, padding, caches, a sequence learned by heart, files, errors."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlm.models import Seq2SeqLM, Seq2SeqLMConfig

SIZE = {"vocab_size": 61, "context": 16, "layers": 2, "heads": 4, "width": 32, "bos": 1, "eos": 2, "pad": 0}
STYLES = {
    "bart": Seq2SeqLMConfig.bart(**SIZE, dropout=0.0),
    "base": Seq2SeqLMConfig.base(**SIZE, dropout=0.0, source_vocab_size=61),
    "pre-norm": Seq2SeqLMConfig(**SIZE, norm_position="pre", activation="swiglu", decoder_layers=1),
    "two vocabularies": Seq2SeqLMConfig(**SIZE, source_vocab_size=70, shared="target", logits_bias=True),
    "nothing shared": Seq2SeqLMConfig(**SIZE, shared="none", positions="sinusoidal", mlp_width=40),
}
each_style = pytest.mark.parametrize("style", STYLES)


def model(style: str = "bart", **changes: Any) -> Seq2SeqLM:
    made = Seq2SeqLM(replace(STYLES[style], **changes)).eval()
    for p in made.parameters():  # larger than at the start, so that every part has a say
        p.data.add_(torch.randn_like(p) * 0.1)
    if made.logits_bias is not None:
        made.logits_bias.normal_()
    return made


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source (4, 9), source_mask, tokens (4, 7), targets."""
    source = torch.randint(3, 61, (4, 9))
    mask = torch.arange(9) < torch.tensor([[9], [1], [5], [8]])
    targets = torch.randint(3, 61, (4, 7))
    targets[1, 3:] = -100
    return source.masked_fill(~mask, 0), mask, torch.randint(3, 61, (4, 7)), targets


@each_style
def test_loss_is_the_cross_entropy_of_the_logits(style: str) -> None:
    source, mask, tokens, targets = batch()
    m = model(style)
    logits = m(source, tokens, source_mask=mask).logits
    assert logits.shape == (4, 7, 61)
    for reduction in ("mean", "sum", "none"):
        want = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        got = m(source, tokens, targets, mask, reduction=reduction)
        assert got.logits is None
        torch.testing.assert_close(got.loss, want)
    m.zero_grad()
    got = torch.autograd.grad(m(source, tokens, targets, mask).loss, list(m.parameters()))
    want_loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for a, b in zip(got, torch.autograd.grad(want_loss, list(m.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(b.abs().max().item(), 1e-2))


def test_label_smoothing_is_for_training_alone() -> None:
    source, mask, tokens, targets = batch()
    m = model(label_smoothing=0.1)
    logits = m(source, tokens, source_mask=mask).logits.flatten(0, 1)
    plain = nn.functional.cross_entropy(logits, targets.flatten())
    smooth = nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(m(source, tokens, targets, mask).loss, plain)
    torch.testing.assert_close(m.train()(source, tokens, targets, mask).loss, smooth)


@each_style
def test_padding_changes_nothing(style: str) -> None:
    """Neither on the right, nor what stands in it, nor in the middle."""
    source, mask, tokens, _ = batch()
    m = model(style)
    together = m(source, tokens, source_mask=mask).logits
    for row, length in enumerate((9, 1, 5, 8)):
        alone = m(source[row : row + 1, :length], tokens[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    other = source.masked_fill(~mask, 60)
    torch.testing.assert_close(m(other, tokens, source_mask=mask).logits, together, rtol=0, atol=1e-5)


@each_style
def test_caches_change_nothing(style: str) -> None:
    source, mask, *_ = batch()
    m = model(style)
    for options in ({}, {"beams": 3}, {"beams": 4, "length_penalty": 2.0}, {"temperature": 1.0, "top_k": 5}):
        torch.manual_seed(3)
        cached = m.generate(source, 10, source_mask=mask, **options)
        torch.manual_seed(3)
        assert torch.equal(m.generate(source, 10, source_mask=mask, use_cache=False, **options), cached)


def test_generate_follows_the_logits_and_fills_up_with_eos() -> None:
    source, mask, *_ = batch()
    m = model(logits_bias=True)
    assert m.logits_bias is not None
    m.logits_bias[2] += 6.0
    m.logits_bias[0] += 50.0  # pad, which is never generated
    found = m.generate(source, 12, source_mask=mask)
    seen = torch.full((4, 1), 1)
    ended = torch.zeros(4, dtype=torch.bool)
    for i in range(found.shape[1]):
        token = m(source, seen, source_mask=mask).logits[:, -1, 1:].argmax(-1) + 1
        token[ended] = 2
        assert torch.equal(found[:, i], token)
        ended |= token == 2
        seen = torch.cat((seen, token[:, None]), 1)
    assert ended.any() and found.shape[1] <= 12
    assert torch.equal(m.generate(source, 5, source_mask=mask, bos=9, eos=60)[:, 0],
                       m(source, torch.full((4, 1), 9), source_mask=mask).logits[:, 0, 1:].argmax(-1) + 1)  # fmt: skip
    assert (m.generate(source, 3, eos=0) == 0).all(), "pad that ends a target too"
    assert not m.training and not m.train().generate(source, 2).requires_grad
    assert m.training, "the mode it was in"


@pytest.mark.parametrize("style", ["base", "pre-norm"])
def test_learns_to_reverse(style: str) -> None:
    """Six tokens backwards, which no model without attention to the source can do."""
    m = Seq2SeqLM(replace(STYLES[style], vocab_size=13, source_vocab_size=None, context=8, label_smoothing=0.0))
    m.train()
    optimizer = torch.optim.Adam(m.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        source = torch.randint(3, 13, (n, 4), generator=generator)
        return source, torch.cat((source.flip(1), torch.full((n, 1), 2)), 1)

    for _ in range(250):
        source, targets = draw(32)
        tokens = torch.cat((torch.full((32, 1), 1), targets[:, :-1]), 1)
        optimizer.zero_grad()
        loss = m(source, tokens, targets).loss
        loss.backward()
        optimizer.step()
    source, targets = draw(50)
    for beams in (1, 3):
        found = m.generate(source, 8, beams=beams)
        assert found.shape == targets.shape and (found == targets).all(1).float().mean() > 0.9


def test_dropout_of_training() -> None:
    source, mask, tokens, targets = batch()
    m = model(dropout=0.3, attention_dropout=0.1).train()
    first = m(source, tokens, targets, mask).loss
    assert first != m(source, tokens, targets, mask).loss
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@each_style
def test_counts(style: str) -> None:
    m = model(style)
    assert m.num_parameters() == sum(p.numel() for p in m.parameters())
    tables = sum(p.numel() for name, p in m.named_parameters() if name.endswith(("embed.weight", "positions.weight")))
    assert m.num_parameters(embeddings=False) == m.num_parameters() - tables
    assert m.flops_per_token() == m.flops_per_token(16, 16) < m.flops_per_token(16, 8)


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    m = model("base", mlp_width=64)
    source, tokens = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 7))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        m(source, tokens)
    c, vectors = m.config, 0
    attention = 4 * c.width * (2 * 9 * 9 + 2 * 7 * 7 + 2 * 7 * 9)  # fastlm.ops.attention is not counted
    for part, length in ((m.encoder, 9), (m.decoder, 7)):
        for name, p in part.named_parameters():  # biases and norms, counted as torch does not
            vectors += 2 * p.numel() * (9 if ".cross.kv." in name else length) if p.dim() == 1 else 0
    assert 3 * (counter.get_total_flops() + attention + vectors) // 7 == m.flops_per_token(9, 7)


@each_style
def test_save_and_load(style: str, tmp_path: Path) -> None:
    source, mask, tokens, _ = batch()
    m = model(style)
    m.save(tmp_path)
    again = Seq2SeqLM.load(tmp_path)
    assert again.config == m.config
    assert torch.equal(
        again.eval()(source, tokens, source_mask=mask).logits, m(source, tokens, source_mask=mask).logits
    )
    assert all(p.requires_grad for p in again.parameters())
    again.reset_parameters()
    assert again.embed.weight.std() < 0.3


def test_bfloat16_and_compile() -> None:
    source, mask, tokens, targets = batch()
    m = model()
    want = m(source, tokens, targets, mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(source, tokens, targets, mask).loss, want, rtol=0.05, atol=0)
    low = model().bfloat16()
    assert low.generate(source, 4, beams=2).shape[0] == 4
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, tokens, targets, mask).loss, want)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"heads": 5}, "width must be a multiple of heads"),
        ({"layers": 0}, "layers must be an integer of at least 1"),
        ({"decoder_layers": 0}, "decoder_layers must be"),
        ({"norm_position": "middle"}, "norm_position must be one of post, pre, got 'middle'"),
        ({"shared": "some"}, "shared must be one of all, target, none"),
        ({"source_vocab_size": 70}, "shared='all' needs one vocabulary, got source_vocab_size=70"),
        ({"positions": "rope"}, "positions must be one of learned, sinusoidal"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"attention_dropout": -0.1}, "attention_dropout must lie in"),
        ({"eos": 61}, "eos must be None or lie in 0 .. 60, got 61"),
    ],
)
def test_bad_configs(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Seq2SeqLMConfig(**{**SIZE, **changes})
    with pytest.raises(ValueError, match="unknown names"):
        Seq2SeqLMConfig.from_dict({**asdict(STYLES["bart"]), "colour": 1})


def test_bad_calls() -> None:
    source, mask, tokens, targets = batch()
    m = model()
    for call, what in (
        (lambda: m(source, tokens[:2]), "source must have the 2 rows of tokens, got 4"),
        (lambda: m(source.repeat(1, 2), tokens), "source must be"),
        (lambda: m(source, tokens, targets[:, :3]), "targets must be"),
        (lambda: m(source, tokens, source_mask=mask[:, :3]), "source_mask must be"),
        (lambda: m(source + 60, tokens), "source must lie in 0 .. 60"),
        (lambda: m.generate(source, 0), "max_new_tokens must lie in 1 .. 16"),
        (lambda: m.generate(source, 17), "max_new_tokens must lie in 1 .. 16"),
        (lambda: m.generate(source, 5, beams=0), "beams must be an integer in 1 .. 61"),
        (lambda: m.generate(source, 5, beams=2, temperature=1.0), "beam search does not sample"),
        (lambda: m.generate(source, 5, beams=2, length_penalty=float("nan")), "length_penalty must be finite, got nan"),
        (lambda: m.generate(source, 5, eos=99), "eos must be"),
        (lambda: model(eos=None).generate(source, 5), "eos must be given, because the config has none"),
    ):
        with pytest.raises(ValueError, match=what):
            call()
    with pytest.raises(TypeError, match="source must be a Tensor of int64"):
        m(source.int(), tokens)
    with pytest.raises(TypeError, match="source_mask must be a Tensor of bool"):
        m(source, tokens, source_mask=mask.long())
