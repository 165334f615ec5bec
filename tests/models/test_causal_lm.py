"""CausalLM: config, forward, generation, files. Beside plain PyTorch it stands in test_parity.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm.models import CausalLM, CausalLMConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"vocab_size": 61, "context": 12, "layers": 2, "heads": 4, "width": 32}
STYLES = {"gpt2": CausalLMConfig.gpt2(**SMALL), "llama": CausalLMConfig.llama(**SMALL, kv_heads=2)}
each_style = pytest.mark.parametrize("style", STYLES)


def small(style: str, **changes: object) -> CausalLM:
    model = CausalLM(dataclasses.replace(STYLES[style], **changes))
    for p in model.parameters():  # larger weights than at the start, so that tokens matter
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def tokens_for(model: CausalLM, B: int = 2, S: int = 12) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (B, S))


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"context": 1.5}, "context must be an integer of at least 1, got 1.5"),
        ({"mlp_width": -1}, "mlp_width must be an integer of at least 1 or None, got -1"),
        ({"heads": 5}, "width must be a multiple of heads, got width=32, heads=5"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got kv_heads=3, heads=4"),
        ({"activation": "tanh"}, "activation must be one of gelu, .*, got 'tanh'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"positions": "alibi"}, "positions must be one of learned, rope, got 'alibi'"),
        ({"positions": "rope", "width": 12}, "even width / heads, got 12 / 4"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
    ],
)
def test_config_refuses(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CausalLMConfig(**{**SMALL, **changes})


def test_presets_have_the_published_sizes() -> None:
    with torch.device("meta"):
        assert CausalLM(CausalLMConfig.gpt2()).num_parameters() == 124_439_808
        assert CausalLM(CausalLMConfig.llama()).num_parameters() == 1_100_048_384


def test_few_fields() -> None:
    assert len(dataclasses.fields(CausalLMConfig)) <= 16


# --- model -----------------------------------------------------------------------------------------------------------


def test_initialised_as_gpt2() -> None:
    model = CausalLM(CausalLMConfig.gpt2(vocab_size=1000, context=64, layers=8, heads=4, width=128))
    block = model.blocks[3]
    for weight in (model.embed.weight, block.attention.qkv.weight, block.mlp.up.weight):
        assert abs(weight.std().item() - 0.02) < 0.001 and abs(weight.mean().item()) < 0.001
    for weight in (block.attention.out.weight, block.mlp.down.weight):
        assert abs(weight.std().item() - 0.02 / 4) < 0.0003
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    tokens = tokens_for(model, 4, 64)
    assert abs(model(tokens, tokens_for(model, 4, 64)).loss.item() - 6.9078) < 0.1  # log 1000: it knows nothing


@each_style
def test_loss_is_that_of_the_logits(style: str) -> None:
    model = small(style)
    tokens, targets = tokens_for(model), tokens_for(model)
    targets[0, :5] = -100
    logits, nothing = model(tokens).logits, model(tokens).loss
    assert logits.shape == (2, 12, 61) and nothing is None
    for reduction in ("mean", "sum", "none"):
        loss, no_logits, _ = model(tokens, targets, reduction=reduction)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        assert no_logits is None
        torch.testing.assert_close(loss, expected)


@each_style
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_learns(style: str, tied: bool) -> None:
    model = small(style, tied=tied)
    model(tokens_for(model), tokens_for(model)).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert (model.head is None) == tied == ("head.weight" not in model.state_dict())


@each_style
def test_empty_batches_and_short_sequences(style: str) -> None:
    model = small(style)
    assert model(tokens_for(model, 0, 5)).logits.shape == (0, 5, 61)
    assert model(tokens_for(model, 3, 1)).logits.shape == (3, 1, 61)
    assert model(tokens_for(model, 0, 5), tokens_for(model, 0, 5)).loss.isnan()


@each_style
def test_bad_tokens_and_targets(style: str) -> None:
    model, tokens = small(style), torch.zeros(2, 4, dtype=torch.int64)
    for call, error, match in [
        (lambda: model(tokens.int()), TypeError, "tokens must be a Tensor of int64, got torch.int32"),
        (lambda: model([[1, 2]]), TypeError, "tokens must be a Tensor of int64, got list"),
        (lambda: model(tokens[0]), ValueError, r"tokens must be \(B, S\) with S at most 12, got \(4,\)"),
        (lambda: model(tokens.repeat(1, 4)), ValueError, r"at most 12, got \(2, 16\)"),
        (lambda: model(tokens + 61), ValueError, r"tokens must lie in 0 .. 60, got 61 .. 61"),
        (lambda: model(tokens - 1), ValueError, r"tokens must lie in 0 .. 60, got -1 .. -1"),
        (lambda: model(tokens, tokens[:, 1:]), ValueError, r"targets must be \(2, 4\) of int64"),
        (lambda: model(tokens, tokens.int()), ValueError, r"targets must be \(2, 4\) of int64"),
        (lambda: model(tokens, tokens, reduction="max"), ValueError, "reduction must be"),
        (lambda: model(tokens, tokens + 61), IndexError, "(?i)target"),
    ]:
        with pytest.raises(error, match=match):
            call()


@each_style
def test_dropout_acts_while_training_alone(style: str) -> None:
    model = small(style, dropout=0.3)
    tokens = tokens_for(model)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_counting() -> None:
    model = small("gpt2")
    everything, body = model.num_parameters(), model.num_parameters(embeddings=False)
    assert everything - body == (61 + 12) * 32
    assert model.flops_per_token() == 6 * (body + 61 * 32) + 12 * 2 * 32 * 12
    assert small("llama").flops_per_token(5) == 6 * small("llama").num_parameters(embeddings=False) + 12 * 2 * 32 * 5


@each_style
def test_compiles_into_one_graph(style: str) -> None:
    torch._dynamo.reset()
    model = small(style)
    tokens = tokens_for(model)
    model(tokens)  # the rotary table is made once, outside the graph
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(compiled(tokens, tokens).loss, model(tokens, tokens).loss)


# --- generation ------------------------------------------------------------------------------------------------------


@each_style
@pytest.mark.parametrize("length", range(1, 13))
def test_cached_equals_uncached_and_the_definition(style: str, length: int) -> None:
    """Greedy, within the context and beyond it, where the window moves."""
    model = small(style)
    prompt = tokens_for(model, 3, length)
    new = 20 - length
    with_cache = model.generate(prompt, new, temperature=0)
    assert torch.equal(with_cache, model.generate(prompt, new, temperature=0, use_cache=False))
    seen = prompt
    for _ in range(new):
        seen = torch.cat((seen, model(seen[:, -12:]).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(with_cache, seen)


@each_style
def test_prompt_longer_than_the_context(style: str) -> None:
    model = small(style)
    prompt = tokens_for(model, 2, 30)
    out = model.generate(prompt, 3, temperature=0)
    assert torch.equal(out[:, :30], prompt)
    assert torch.equal(out[:, 30:], model.generate(prompt[:, -12:], 3, temperature=0)[:, 12:])


def test_stream_is_what_generate_returns() -> None:
    model = small("llama")
    prompt = tokens_for(model, 2, 4)
    seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
    stream = list(model.stream(prompt, 6, top_k=5, top_p=0.9, generator=seeded[0]))
    assert len(stream) == 6 and all(t.shape == (2,) for t in stream)
    whole = model.generate(prompt, 6, top_k=5, top_p=0.9, generator=seeded[1])
    assert torch.equal(torch.stack(stream, 1), whole[:, 4:])
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_eos_ends_a_sequence_and_is_repeated() -> None:
    model = small("gpt2")
    prompt = tokens_for(model, 2, 3)
    plain = model.generate(prompt, 8, temperature=0)
    eos = int(plain[0, 5])  # what the first sequence says third
    out = model.generate(prompt, 8, temperature=0, eos=eos)
    for row, free in zip(out[:, 3:].tolist(), plain[:, 3:].tolist(), strict=True):
        end = free.index(eos) if eos in free else len(row)
        assert row[: end + 1] == free[: min(end + 1, len(row))] and set(row[end:]) <= {eos}
    alone = model.generate(prompt[:1], 8, temperature=0, eos=eos)
    assert alone.shape[1] == 3 + plain[0, 3:].tolist().index(eos) + 1


@each_style
def test_generation_leaves_the_model_as_it_was(style: str) -> None:
    model = small(style, dropout=0.5)
    model.blocks[1].eval()  # a part that somebody froze
    modes = [m.training for m in model.modules()]
    stream = model.stream(tokens_for(model, 1, 3), 5, temperature=0)
    first = next(stream)
    assert [m.training for m in model.modules()] == modes  # between two tokens, too
    assert not first.requires_grad and torch.is_grad_enabled()
    del stream
    assert torch.equal(model.generate(torch.ones(1, 3, dtype=torch.int64), 4, temperature=0),
                       model.generate(torch.ones(1, 3, dtype=torch.int64), 4, temperature=0))  # fmt: skip
    model(tokens_for(model), tokens_for(model)).loss.backward()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or positive and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be .* got nan"),
        ({"top_k": 0}, "top_k must be None or at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be None or lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p must be .* got 1.1"),
        ({"eos": 61}, "eos must be None or lie in 0 .. 60, got 61"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"tokens must be \(B, S\) with S at least 1"),
        ({"tokens": torch.full((1, 2), 61)}, "tokens must lie in 0 .. 60"),
    ],
)
def test_stream_refuses_before_its_first_step(options: dict, match: str) -> None:
    arguments = {"tokens": torch.zeros(1, 2, dtype=torch.int64), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=match):
        small("gpt2").stream(**arguments)


# --- sampling --------------------------------------------------------------------------------------------------------


def draws(logits: list[float], **options: object) -> torch.Tensor:
    """Shares of the tokens among many draws."""
    from fastlm.models._sampling import sample

    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": None, **options}
    counts = sample(torch.tensor(logits).expand(20_000, -1), **settings).bincount(minlength=len(logits))
    return counts / 20_000


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.49}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(options: dict, expected: list[float]) -> None:
    torch.testing.assert_close(draws(LOGITS, **options), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.02)
    assert all(share == 0 for share, p in zip(draws(LOGITS, **options).tolist(), expected, strict=True) if p == 0)


def test_equal_logits_share_top_k() -> None:
    assert (draws([0.0, 0.0, -1.0], top_k=1) > 0).sum() <= 2


# --- files -----------------------------------------------------------------------------------------------------------


@each_style
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(style: str, tied: bool, tmp_path: Path) -> None:
    model = small(style, tied=tied)
    model.save(tmp_path / "new" / "folder")
    loaded = CausalLM.load(tmp_path / "new" / "folder")
    assert loaded.config == model.config and loaded.training
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokens = tokens_for(model)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    loaded(tokens, tokens).loss.backward()
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = small("llama").bfloat16()
    model.save(tmp_path)
    assert all(p.dtype is torch.bfloat16 for p in CausalLM.load(tmp_path).parameters())


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    model, weights, config = small("gpt2"), tmp_path / "model.safetensors", tmp_path / "config.json"

    def refuses(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            CausalLM.load(tmp_path)
        model.save(tmp_path)
        CausalLM.load(tmp_path)

    with pytest.raises(FileNotFoundError, match=r"no folder .*elsewhere"):
        CausalLM.load(tmp_path / "elsewhere")
    refuses(FileNotFoundError, "holds no config.json")
    weights.unlink()
    refuses(FileNotFoundError, "holds no model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(ValueError, "model.safetensors is truncated or not a safetensors file")
    weights.write_bytes(b"")
    refuses(ValueError, "model.safetensors is truncated or not a safetensors file")
    config.write_text(config.read_text()[:20])
    refuses(ValueError, "config.json must hold a JSON object, but is truncated")
    config.write_text("[1]")
    refuses(ValueError, "config.json must hold a JSON object, got list")
    config.write_text(json.dumps({**dataclasses.asdict(model.config), "layers": 3}))
    refuses(ValueError, "another config than .*: layers is 2 there and 3 here")
    config.write_text(json.dumps({**dataclasses.asdict(model.config), "colour": 3}))
    refuses(ValueError, r"unknown names \['colour'\]")
    config.write_text("{}")
    refuses(ValueError, "lacks .*vocab_size")


def test_load_refuses_tensors_of_another_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = small("gpt2")
    model.save(tmp_path)
    state = model.state_dict()
    del state["norm.weight"]
    save_file({**state, "embed.weight": torch.zeros(60, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed.weight is \(60, 32\), must be \(61, 32\); norm.weight is missing"):
        CausalLM.load(tmp_path)


FULL_DISK = """
import resource, signal, sys, torch
from fastlm.models import CausalLM, CausalLMConfig
model = CausalLM(CausalLMConfig(vocab_size=61, context=12, layers=2, heads=4, width=32))
model.save(sys.argv[1])
torch.nn.init.zeros_(model.embed.weight)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    model.save(sys.argv[1])
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_leaves_the_previous_model_whole(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("OSError") and "model.safetensors" in run.stdout
    assert CausalLM.load(tmp_path).embed.weight.abs().sum() > 0
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_attention_maps(style: str) -> None:
    """Row s of every map is a distribution over tokens 0 to s, and the maps times the values are the layer's output."""
    config = getattr(CausalLMConfig, style)(vocab_size=19, context=8, layers=2, heads=4, width=32, kv_heads=2)
    model = CausalLM(config)
    tokens = torch.randint(19, (2, 8))
    with pytest.warns(UserWarning, match=r"attention maps are O\(S\^2\): .* 2 x 4 x 8 x 8 weights"):
        out = model(tokens, return_attention=True)
    plain = model(tokens)
    assert plain.attention is None
    assert torch.equal(out.logits, plain.logits)
    assert out.attention is not None and [m.shape for m in out.attention] == [(2, 4, 8, 8)] * 2
    for weights in out.attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 8))
        assert weights.triu(1).eq(0).all() and weights.tril().gt(0).sum() == 2 * 4 * 36
    block = model.blocks[0]
    x = model.embed(tokens)
    rope = None if model.rope is None else model.rope(8)
    x = block.norm1(x if model.positions is None else x + model.positions.weight[:8])
    values = block.attention.qkv(x)[..., -16:].view(2, 8, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    expected = block.attention.out((out.attention[0] @ values).transpose(1, 2).reshape(2, 8, 32))
    torch.testing.assert_close(block.attention(x, rope), expected, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning):
        trained = model(tokens, tokens, return_attention=True)
    assert trained.loss is not None and trained.attention is not None
