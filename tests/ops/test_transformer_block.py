"""transformer_block against float64 in plain PyTorch, and the same numbers as its parts one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.ops.transformer_block import LINEAR, PARAMETERS
from fastlm.reference._random import kept
from tests.models.test_parity import assert_as_accurate
from tests.ops.harness import BACKWARD, FORWARD, assert_same_bits, differentiate, each_backend, on

B, S, C, H = 3, 21, 64, 4
STYLES: dict[str, dict[str, Any]] = {
    "gpt2": {"activation": "gelu_tanh"},
    "no biases": {"activation": "gelu", "bias": False},
    "llama": {"activation": "swiglu", "norm": "rms", "kv_heads": 2, "bias": False, "rope": True},
    "encoder": {"activation": "geglu", "norm": "rms", "causal": False},
}
each_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(autouse=True)
def one_thread(settings: None) -> None:
    """So small that on a busy machine two threads would wait for each other, not share the work."""
    torch.set_num_threads(1)


def made(style: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor | None], dict[str, Any]]:
    """x and the twelve parameters; options."""
    options = {"heads": H, **STYLES[style]}
    bias, turned = options.pop("bias", True), options.pop("rope", False)
    gated, rms = options["activation"] in ("swiglu", "geglu"), options.get("norm") == "rms"
    qkv, up = C + 2 * options.get("kv_heads", H) * (C // H), 96 * (1 + gated)
    shapes = ((C,), (C,), (qkv, C), (qkv,), (C, C), (C,), (C,), (C,), (up, C), (up,), (C, 96), (C,))
    tensors: list[Tensor | None] = [torch.randn(B, S, C).to(dtype)]
    for i, (name, shape) in enumerate(zip(PARAMETERS, shapes, strict=True)):
        there = not name.endswith("bias") or (bias if i in LINEAR else bias and not rms)
        scale = 1.0 if name.startswith("norm") else shape[-1] ** -0.5
        tensors.append((torch.randn(shape) * scale).to(dtype) if there else None)
    if turned:
        angles = torch.randn(S, C // H // 2)
        options["rope"] = (angles.cos(), angles.sin())
    return tensors, options


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain(
    x: Tensor, *p: Tensor | None, heads: int, kv_heads: int | None = None, causal: bool = True,
    activation: str = "gelu", norm: str = "layer", rope: tuple[Tensor, Tensor] | None = None,
    keep: list[Tensor] | None = None, drop: tuple[float, ...] = (), low: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The block of torch's own parts; `low` is the dtype of the products."""
    n1w, n1b, qkvw, qkvb, ow, ob, n2w, n2b, uw, ub, dw, db = p
    kv_heads, low = kv_heads or heads, low or x.dtype

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.layer_norm(x, (C,), w, b) if norm == "layer" else F.rms_norm(x, (C,), w, 1e-5)

    def linear(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        assert w is not None
        return F.linear(x.to(low), w.to(low), None if b is None else b.to(low))

    def dropped(x: Tensor, i: int) -> Tensor:
        return x if keep is None else torch.where(keep[i].view(x.shape), x / (1 - drop[i]), 0)

    b, s, _ = x.shape
    every = linear(normalise(x, n1w, n1b), qkvw, qkvb).view(b, s, -1, C // heads).transpose(1, 2)
    q, k, v = every.split((heads, kv_heads, kv_heads), 1)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * (C // heads) ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
    attended = dropped(logits.softmax(-1), 0) @ v
    h = x + dropped(linear(attended.transpose(1, 2).reshape(b, s, C), ow, ob), 1)
    u = linear(normalise(h, n2w, n2b), uw, ub)
    if activation in ("swiglu", "geglu"):
        gate, u = u.chunk(2, -1)
        g = (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * u
    else:
        g = F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
    return h + dropped(linear(g, dw, db), 2)


def ours(x: Tensor, *parameters: Tensor | None, low: torch.dtype | None = None, **options: Any) -> Tensor:
    lowered = None if low is None else [None if (p := parameters[i]) is None else p.detach().to(low) for i in LINEAR]
    return ops.transformer_block(x, parameters, lowered=lowered, **options)


@each_backend
@each_style
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_matches_float64(backend: str, style: str, precision: str) -> None:
    low = torch.bfloat16 if precision == "mixed" else None
    tensors, options = made(style, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with on(backend):
        (y,), grads = differentiate(lambda *t: ours(*t, low=low, **options), tensors)
    (exact,), exact_grads = differentiate(
        lambda *t: plain(*t, **options), [None if t is None else t.double() for t in tensors]
    )
    (eager,), eager_grads = differentiate(lambda *t: plain(*t, low=low, **options), tensors)
    assert_as_accurate("y", y, exact, eager, FORWARD)
    names = ["x", *(name for name, t in zip(PARAMETERS, tensors[1:], strict=True) if t is not None)]
    for name, *found in zip(names, grads, exact_grads, eager_grads, strict=True):
        assert_as_accurate(f"d{name}", *found, BACKWARD)


@each_backend
@pytest.mark.parametrize(
    ("p", "low"), [((0.3, 0.3), None), ((0.3, 0.3), torch.bfloat16), ((0.3, 0.0), None), ((0.0, 0.3), None)], ids=str
)
def test_drops_what_the_hash_says(backend: str, p: tuple[float, float], low: torch.dtype | None) -> None:
    tensors, options = made("gpt2")
    state = torch.get_rng_state()
    seeds = iter([torch.randint(2**63 - 1, (1,)) for used in (p[0], p[1], p[1]) if used])
    torch.set_rng_state(state)
    keep = [torch.ones(B, H, S, S, dtype=torch.bool), *(torch.ones(B, S, C, dtype=torch.bool) for _ in range(2))]
    if p[0]:
        keep[0] = kept(next(seeds), p[0], B * H * S, torch.arange(S))
    if p[1]:
        keep[1:] = [kept(next(seeds), p[1], B * S, torch.arange(C)) for _ in range(2)]
    drop = (p[0], p[1], p[1])
    with on(backend):
        (y,), grads = differentiate(
            lambda *t: ours(*t, low=low, attention_dropout=p[0], dropout=p[1], **options), tensors
        )
    (exact,), exact_grads = differentiate(
        lambda *t: plain(*t, keep=keep, drop=drop, **options), [None if t is None else t.double() for t in tensors]
    )
    (eager,), eager_grads = differentiate(lambda *t: plain(*t, keep=keep, drop=drop, low=low, **options), tensors)
    assert_as_accurate("y", y, exact, eager, FORWARD)
    for i, found in enumerate(zip(grads, exact_grads, eager_grads, strict=True)):
        assert_as_accurate(str(i), *found, BACKWARD)


@each_backend
@each_style
def test_same_bits_again(backend: str, style: str) -> None:
    tensors, options = made(style)
    tensors[0] = torch.randn(2 * B, S, 2 * C)[::2, :, C:]  # strided

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        outputs, grads = differentiate(lambda *t: ours(*t, attention_dropout=0.1, dropout=0.1, **options), tensors)
        return [*outputs, *grads]

    with on(backend):
        first = run()
        assert_same_bits(first, run())


@each_backend
def test_weight_gradients_under_autocast_keep_float32_sums(backend: str) -> None:
    if backend == "reference":
        return
    tensors, options = made("gpt2")
    with on(backend):
        _, grads = differentiate(lambda *t: ours(*t, low=torch.bfloat16, **options), tensors)
    for i in LINEAR:
        assert not torch.equal(grads[1 + i], grads[1 + i].bfloat16().float()), PARAMETERS[i]


@each_backend
def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    tensors, options = made("gpt2")
    x = tensors[0]
    assert x is not None
    with on(backend):
        _, expected = differentiate(lambda *t: ours(*t, **options), tensors)
        _, (dx,) = differentiate(lambda x: ours(x, *tensors[1:], **options), [x])
        with torch.no_grad():
            y = ours(*tensors, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(dx, expected[0])
    assert not y.requires_grad


@each_backend
def test_torch_compile_fullgraph_and_opcheck(backend: str) -> None:
    torch._dynamo.reset()
    tensors, options = made("llama")
    name = backend.partition("-")[0]
    with on(backend):
        compiled = torch.compile(lambda *t: ours(*t, **options), fullgraph=True, backend="aot_eager")
        expected, actual = (differentiate(f, tensors) for f in (lambda *t: ours(*t, **options), compiled))
        assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])
        rest = (*options["rope"], None, H, 2, True, "swiglu", "rms", 1e-5, 0.0, 0.0)
        torch.library.opcheck(
            torch.ops.fastlm.transformer_block_forward.default, (*tensors, *rest, name),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@each_backend
def test_double_backward_raises(backend: str) -> None:
    tensors, options = made("gpt2")
    assert tensors[0] is not None
    x = tensors[0].requires_grad_()
    with on(backend):
        y = ours(*tensors, **options)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: torch.ones(2, 3)}, ValueError, r"x must be \(B, S, C\)"),
        ({0: torch.ones(2, 3, C, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({1: torch.ones(C + 1)}, ValueError, "norm1_weight must be"),
        ({3: None}, ValueError, "parameters must be twelve"),
        ({9: torch.ones(95, C)}, ValueError, "up_weight must be"),
        ({11: torch.ones(C, 96).bfloat16()}, ValueError, "down_weight must have the dtype"),
        ({"heads": 5}, ValueError, "heads must divide C"),
        ({"activation": "relu"}, ValueError, "activation must be"),
        ({"norm": "batch"}, ValueError, "norm must be"),
        ({"dropout": 1.0}, ValueError, "dropout must be"),
        ({"rope": (torch.ones(S, 9), torch.ones(S, 9))}, ValueError, "cos must be"),
        ({0: torch.ones(1, 2, C).double(), "backend": "cpu"}, fastlm.UnsupportedError, "float64"),
    ],
)
def test_bad_arguments(change: dict[Any, Any], error: type[Exception], match: str) -> None:
    tensors, options = made("gpt2")
    for key, value in change.items():
        if isinstance(key, int):
            tensors[key] = value
        else:
            options[key] = value
    with pytest.raises(error, match=match):
        ours(*tensors, **options)  # type: ignore[arg-type]
