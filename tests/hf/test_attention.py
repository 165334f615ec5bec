"""attn_implementation="fastlm": every option of the interface against transformers' own implementations."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastlm.hf
from fastlm import ops
from fastlm.hf import attention as hf_attention
from fastlm.hf._masks import pattern_of
from fastlm.patching import Report
from tests.hf import zoo
from tests.ops.harness import assert_same_bits

B, H, HK, S, D = 2, 4, 2, 13, 8
fastlm.hf.register()


def config(implementation: str = "fastlm", **values: Any) -> LlamaConfig:
    made = LlamaConfig(hidden_size=H * D, num_attention_heads=H, num_key_value_heads=HK, **values)
    made._attn_implementation = implementation
    return made


def layer(**values: Any) -> Any:
    return SimpleNamespace(**{"num_key_value_groups": H // HK, "config": config(), **values})


def operands(t: int = S, s: int = S, dv: int = D) -> list[Tensor]:
    shapes = (s, H, D), (t, HK, D), (t, HK, dv)
    return [torch.randn(B, *shape).transpose(1, 2).requires_grad_() for shape in shapes]


def both(make: Any, module: Any = None, tensors: list[Tensor] | None = None, **options: Any) -> Any:
    """Calls ours and sdpa's, each with the mask that its own mask function makes, and compares output and gradients."""
    q, k, v = operands() if tensors is None else tensors
    leaves = [t for t in (q, k, v, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    results = []
    for name, function in (("sdpa", sdpa_attention_forward), ("fastlm", hf_attention.attention)):
        mask = make(name) if callable(make) else make
        out, weights = function(module or layer(), q, k, v, mask, **options)
        assert weights is None and out.is_contiguous()
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((mask, [out, *torch.autograd.grad(out, leaves, dy)]))
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    return results[1][0]


def padding(side: str) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ops.attention is called with."""
    seen: list[dict[str, Any]] = []
    stock = ops.attention

    def spy(*tensors: Tensor, **options: Any) -> Any:
        seen.append({"tensors": tensors, **options})
        return stock(*tensors, **options)

    monkeypatch.setattr(ops, "attention", spy)
    return seen


MASKS: dict[str, Any] = {
    "causal": lambda c, x, m: masking_utils.create_causal_mask(c, x, m, None),
    "window": lambda c, x, m: masking_utils.create_sliding_window_causal_mask(c, x, m, None),
    "both ways": lambda c, x, m: masking_utils.create_bidirectional_mask(c, x, m),
    "window both ways": lambda c, x, m: masking_utils.create_bidirectional_sliding_window_mask(c, x, m),
}


@pytest.mark.parametrize("padded", ["", "left", "right", "all ones"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_become_options(kind: str, padded: str, calls: list[dict[str, Any]]) -> None:
    two = None if not padded else torch.ones(B, S, dtype=torch.int64) if padded == "all ones" else padding(padded)
    make = lambda name: MASKS[kind](config(name, sliding_window=4), torch.empty(B, S, H * D), two)  # noqa: E731
    both(make, layer(is_causal="ways" not in kind))
    (call,) = calls
    assert call["mask"] is None and call["causal"] is ("ways" not in kind)
    assert call["window"] == {"window": (3, None), "window both ways": (4, 4)}.get(kind)
    assert (call["documents"] is not None) == (padded in ("left", "right")) or "window" in kind
    assert call["tensors"][1].shape[1] == HK


@pytest.mark.parametrize("window", [None, 3], ids=["", "window"])
def test_packed_by_positions(window: int | None, calls: list[dict[str, Any]]) -> None:
    positions = torch.tensor([[*range(5), *range(1), *range(7)], [*range(13)]])
    create = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    make = lambda name: create(config(name, sliding_window=window), torch.empty(B, S, H * D), None, None, positions)  # noqa: E731
    both(make, position_ids=positions)
    assert calls[0]["mask"] is None and calls[0]["documents"][0].shape == (B, S)


@pytest.mark.parametrize("window", [None, 5], ids=["", "window"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_queries_behind_a_cache(window: int | None, padded: bool, calls: list[dict[str, Any]]) -> None:
    """Prefill in pieces: the last query stands at the last key, so that the mask is bottom-right."""
    from transformers import DynamicCache

    past = 6
    cache = DynamicCache()
    cache.update(torch.zeros(B, HK, past, D), torch.zeros(B, HK, past, D), 0)
    two = padding("left") if padded else None
    create = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    make = lambda name: create(config(name, sliding_window=window), torch.empty(B, S - past, H * D), two, cache)  # noqa: E731
    both(make, tensors=operands(s=S - past))
    assert calls[0]["mask"] is None and calls[0]["causal"] == "bottom-right"


def test_one_query_sees_every_key() -> None:
    both(None, layer(is_causal=True), operands(s=1))
    both(None, layer(is_causal=True), operands(s=1), sliding_window=2)


def test_a_static_cache_has_room_left() -> None:
    """Without a mask, queries count from the first key, and what stands behind them is unseen."""
    both(None, layer(is_causal=True), operands(t=S + 5))
    both(None, layer(is_causal=True), operands(t=S + 5), position_bias=torch.randn(1, H, S, S + 5, requires_grad=True))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("given", [None, True, False])
def test_causal_by_argument_before_the_layer(own: bool, given: bool | None) -> None:
    both(None, layer(is_causal=own), is_causal=given)
    both(None, is_causal=given)


def test_cross_attention_with_other_lengths_and_a_wider_value() -> None:
    both(None, layer(is_causal=False), operands(t=29, dv=16), scaling=0.3)
    mask = torch.rand(B, 1, 1, 29) > 0.4
    both(mask, layer(is_causal=False), operands(t=29))


def test_a_batch_of_one_is_expanded() -> None:
    q, k, v = operands()
    out, _ = hf_attention.attention(layer(), q[:1], k, v, None)
    want, _ = hf_attention.attention(layer(), q[:1].expand(B, -1, -1, -1), k, v, None)
    assert_same_bits([out], [want])
    mask = masking_utils.create_causal_mask(config(), torch.empty(1, S, H * D), padding("left")[:1], None)
    both(mask, tensors=[q, k, v])  # of another batch than its note


def test_cross_attention_beside_flattened_sequences() -> None:
    """The decoder hands its lengths to both attentions."""
    q, k, v = (t[:1] for t in operands(t=29))
    cu = torch.tensor([0, 5, 13])
    kwargs = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 8, "max_length_k": 8}
    out, _ = hf_attention.attention(layer(is_causal=False), q, k, v, None, **kwargs)
    want, _ = hf_attention.attention(layer(is_causal=False), q, k, v, None)
    assert_same_bits([out], [want])


@pytest.mark.parametrize("kind", ["or", "and", "blocks", "four dimensions", "added"])
def test_other_masks_are_read_as_they_are(kind: str, calls: list[dict[str, Any]]) -> None:
    x = torch.empty(B, S, H * D)
    four = torch.ones(S, S, dtype=torch.bool).tril(2).expand(B, 1, S, S)
    image = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1]]).expand(B, -1)
    extra: dict[str, Any] = {
        "or": {"or_mask_function": lambda b, h, q, k: k < 3},
        "and": {"and_mask_function": lambda b, h, q, k: (q - k) % 3 != 1},
        "blocks": {"block_sequence_ids": image},
    }.get(kind, {})
    if kind == "added":
        four = torch.randn(B, H, S, S)
    two = four if kind in ("four dimensions", "added") else padding("left")
    both(lambda name: masking_utils.create_causal_mask(config(name), x, two, None, **extra))
    assert calls[0]["mask"] is not None and "documents" not in calls[0]


def test_a_changed_mask_says_no_more_than_it_holds() -> None:
    def made() -> Tensor:
        mask = masking_utils.create_causal_mask(config(), torch.empty(B, S, H * D), padding("left"), None)
        assert isinstance(mask, Tensor) and pattern_of(mask) is not None
        return mask

    full = made()
    assert full.dtype is torch.bool and full.shape == (B, 1, S, S) and not full[0, 0, :, :4].any()
    assert pattern_of(full[:, :, :, :4]) is None and pattern_of(full & full) is None
    full[:, :, 1, 0] = False
    assert pattern_of(full) is None
    with torch.inference_mode():
        assert pattern_of(made()) is not None


@pytest.mark.parametrize("padded", ["", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_position_bias_has_a_gradient(padded: str, causal: bool) -> None:
    bias = torch.randn(1, H, S, S, requires_grad=True)
    create = MASKS["causal" if causal else "both ways"]
    make = lambda name: create(config(name), torch.empty(B, S, H * D), padding("right") if padded else None)  # noqa: E731
    both(make, layer(is_causal=causal), position_bias=bias)
    both(torch.rand(B, 1, S, S) > 0.1, layer(), position_bias=bias)
    both(torch.randn(B, 1, S, S), layer(), position_bias=bias)


def test_softcap_and_sinks() -> None:
    """Against their formulas: sdpa has neither."""
    q, k, v = operands()
    sinks = torch.randn(H, requires_grad=True)
    mask = masking_utils.create_causal_mask(config(), torch.empty(B, S, H * D), padding("right"), None)
    assert mask is not None
    out, _ = hf_attention.attention(layer(), q, k, v, mask, softcap=2.0, s_aux=sinks, scaling=0.5)
    logits = 2.0 * torch.tanh(0.5 * q @ k.repeat_interleave(2, 1).mT / 2.0)
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.cat((logits, sinks.view(1, H, 1, 1).expand(B, H, S, 1)), -1).softmax(-1)[..., :-1]
    want = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    dy = torch.randn_like(want)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)
    for ours, theirs in zip(*(torch.autograd.grad(o, (q, k, v, sinks), dy) for o in (out, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3], ids=["", "window"])
def test_cu_seq_lens(window: int | None) -> None:
    """One behind the other without padding; the mask of packing, where there is one too, says the same."""
    lengths = [5, 1, 7]
    q, k, v = (t[:1] for t in operands())
    cu = torch.tensor([0, 5, 6, 13])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    create = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    masks = [
        create(config(n, sliding_window=window), torch.empty(1, S, 1), None, None, positions)
        for n in ("sdpa", "fastlm")
    ]
    want, _ = sdpa_attention_forward(layer(), q, k, v, masks[0])
    kwargs = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": torch.tensor(7), "max_length_k": 7}
    for mask in (masks[1], None):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, _ = hf_attention.attention(
                layer(), q, k, v, mask, position_ids=positions, sliding_window=window, **kwargs
            )
        assert out.is_contiguous()
        torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)


def test_dropout_and_autocast() -> None:
    q, k, v = operands()
    torch.manual_seed(3)
    dropped, _ = hf_attention.attention(layer(), q, k, v, None, dropout=0.5)
    torch.manual_seed(3)
    again, _ = hf_attention.attention(layer(), q, k, v, None, dropout=0.5)
    assert_same_bits([dropped], [again])
    assert not torch.equal(dropped, hf_attention.attention(layer(), q, k, v, None)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert hf_attention.attention(layer(), q, k, v.bfloat16(), None)[0].dtype is torch.bfloat16


def test_what_it_cannot_do() -> None:
    q, k, v = operands()
    module = layer()
    with pytest.warns(UserWarning, match='use "eager" for output_attentions'):
        hf_attention.attention(module, q, k, v, None, output_attentions=True)
    hf_attention.attention(module, q, k, v, None, output_attentions=True)  # once for a model
    with pytest.raises(NotImplementedError, match="paged"):
        hf_attention.attention(module, q, k, v, None, cache=object())


# --- models ----------------------------------------------------------------------------------------------------------


def implementations(model: nn.Module) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_apply_and_undo(name: str) -> None:
    model = zoo.build(name)
    before, saved = implementations(model), model.config.to_dict()
    keys = list(model.state_dict())
    report = Report(name)
    hf_attention.apply(model, report)
    assert set(implementations(model)) == {"fastlm"} and model.config.to_dict() == saved
    assert not report.left and len({entry.name for entry in report.entries}) == len(report.entries)
    assert any("Linear" in entry.kind or "Conv1D" in entry.kind for entry in report.replaced)
    twin = copy.deepcopy(model)
    hf_attention.undo(twin)
    assert implementations(twin) == before and set(implementations(model)) == {"fastlm"}
    hf_attention.undo(model)
    hf_attention.undo(model)
    assert implementations(model) == before and list(model.state_dict()) == keys


def test_models_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    small = GPTNeoConfig(
        vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
        intermediate_size=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def left(model: nn.Module, match: str) -> None:
        before, report = implementations(model), Report("")
        hf_attention.apply(model, report)
        assert not report.replaced and match in report.left[0].reason and implementations(model) == before
        hf_attention.undo(model)

    left(GPTNeoForCausalLM(small), "AttentionInterface")
    left(zoo.build("llama", head_dim=512), "heads are of 512")
    odd = zoo.build("llama")
    for name in ("_supports_sdpa", "_supports_flash_attn"):
        monkeypatch.setattr(type(odd), name, False)
    left(odd, "neither sdpa nor flash")


def test_by_name(tmp_path: Any) -> None:
    model = zoo.build("llama", "fastlm")
    inputs = zoo.inputs("llama", "left")
    want = zoo.build("llama", "sdpa")(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="fastlm")
    assert loaded.config._attn_implementation == "fastlm"
    torch.testing.assert_close(loaded(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    loaded.set_attn_implementation("sdpa")
    assert torch.equal(loaded(**inputs).logits, want)
    assert "flash" not in hf_attention.NAME  # such a name goes to flash-attn's importer
    with pytest.raises(ValueError, match="fastln"):
        loaded.set_attn_implementation("fastln")


def test_leaking_documents_are_told(recwarn: pytest.WarningsRecorder) -> None:
    inputs = zoo.inputs("llama", "packed", labels=False)
    leak = {**inputs, "use_cache": True}
    ones = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    for name, leaking in (("llama", leak), ("mistral", leak), ("gpt2", ones), ("qwen3", ones)):
        model = zoo.build(name, "fastlm")
        model(**inputs)
        assert not recwarn.list
        with pytest.warns(UserWarning, match=r"use_cache=False.*cu_seq_lens") as caught:
            model(**leaking)
            model(**{**leaking, "position_ids": leaking["position_ids"].clone()})
        assert len(caught) == 1
        stock = zoo.build(name)
        torch.testing.assert_close(model(**leaking).logits, stock(**leaking).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_is_no_leak(name: str) -> None:
    model = zoo.build(name, "fastlm")
    for kind in ("left", "right"):
        inputs = zoo.inputs(name, kind)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 1)
        model(**inputs, use_cache=True)


def test_flattened_batches_with_a_cache() -> None:
    """cu_seq_lens keep documents apart where stock implementations let them leak: as use_cache=False does."""
    inputs = zoo.inputs("llama", "packed", labels=False, batch=1)
    first = int(inputs["position_ids"].diff().argmin()) + 1
    cu = torch.tensor([0, first, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    want = zoo.build("llama", "sdpa")(**inputs).logits
    got = zoo.build("llama", "fastlm")(**{**inputs, "use_cache": True}, **lengths).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "t5", "bart", "whisper"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same_tokens(name: str, cache: str) -> None:
    inputs = zoo.inputs(name, "left" if name in zoo.DECODERS else "right", labels=False)
    inputs.pop("decoder_input_ids", None)
    inputs.pop("position_ids", None)
    made = []
    for implementation in (None, "fastlm"):
        model = zoo.build(name, implementation).eval()
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
        if cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": True}
        with torch.no_grad():
            made.append(model.generate(**inputs, **options))
    assert torch.equal(*made)


def test_beams_and_cropped_cache() -> None:
    inputs = zoo.inputs("llama", "left", labels=False)
    inputs.pop("position_ids")
    made = [
        zoo.build("llama", name).eval().generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
        for name in ("sdpa", "fastlm")
    ]
    assert torch.equal(*made)


def test_sinks_of_gpt_oss() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    tiny = GptOssConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        head_dim=8, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=5, pad_token_id=0,
        max_position_embeddings=64, rope_scaling={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM._from_config(tiny, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = zoo.inputs("llama", "right")
    results = []
    for implementation in ("eager", "fastlm"):
        model.set_attn_implementation(implementation)
        loss = model(**inputs).loss
        grads = torch.autograd.grad(loss, [layer.self_attn.sinks for layer in model.model.layers])
        results.append([loss, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-7)


def test_torch_compile() -> None:
    torch._dynamo.reset()
    model = zoo.build("llama", "fastlm", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for kind in ("plain", "left"):
        inputs = {**zoo.inputs("llama", kind), "use_cache": False}
        want = model(**inputs)
        got = compiled(**inputs)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        got.loss.backward()
