"""The pattern around every op. When nothing listens, a call goes past the dispatcher; else through it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastlm import ops
from fastlm.ops._library import nothing_listens


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A subclass without memory of its own, as distributed and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs or {}))
        return function(*args, **kwargs)


def test_a_plain_call_goes_straight() -> None:
    assert nothing_listens()
    x = torch.randn(3, 8)
    direct = torch.ops.fastlm.gelu_forward(x, False, "reference")
    assert torch.equal(ops.gelu(x, backend="reference"), direct)


def test_a_dispatch_mode_sees_forward_and_backward() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with Recorder() as recorder:
        assert not nothing_listens()
        ops.gelu(x).sum().backward()
    assert "fastlm.gelu_forward.default" in recorder.names and "fastlm.gelu_backward.default" in recorder.names


def test_the_profiler_names_the_op() -> None:
    with torch.autograd.profiler.profile() as profile:
        ops.gelu(torch.randn(3, 8))
    assert "fastlm::gelu_forward" in {event.name for event in profile.function_events}


@pytest.mark.filterwarnings("default")
def test_vmap_runs_once_per_sample() -> None:
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(ops.gelu)(x), ops.gelu(x))


def test_tracing_records_the_op() -> None:
    graph = make_fx(lambda x: ops.gelu(x))(torch.randn(3, 8))
    assert "fastlm.gelu_forward" in graph.code


def test_fake_and_wrapped_tensors_never_reach_a_pointer() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(3, 8))
    assert ops.gelu(fake).shape == (3, 8)  # outside the mode too
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(ops.gelu(Wrapper(x)), ops.gelu(x))


def test_default_device_does_not_move_outputs() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    with torch.device("meta"):
        y = ops.rms_norm(x, weight)
        y.backward(y.detach())
    assert y.device.type == "cpu" and x.grad is not None and x.grad.device.type == "cpu"


@pytest.mark.parametrize("op", ["swiglu", "rope", "layer_norm", "add_layer_norm", "add_rms_norm", "dropout_add"])
def test_one_tensor_given_twice_is_compiled(op: str) -> None:
    """dynamo refuses an autograd.Function the same tensor in two places."""
    x = torch.randn(2, 4, 8, 16, requires_grad=True)
    w, table = torch.randn(16, requires_grad=True), torch.randn(8, 8)
    calls = {
        "swiglu": lambda: ops.swiglu(x, x),
        "rope": lambda: ops.rope(x, x, table, table),
        "layer_norm": lambda: ops.layer_norm(x, w, w),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, w, w),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, w),
        "dropout_add": lambda: ops.dropout_add(x, x, 0.0),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[op], fullgraph=True, backend="aot_eager")
    expected, actual = calls[op](), compiled()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradients = []
    for made in (expected, actual):
        outputs = made if isinstance(made, tuple) else (made,)
        gradients.append(torch.autograd.grad(outputs, x, [torch.ones_like(o) for o in outputs])[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gelu", "softmax", "linear_cross_entropy"])
def test_rows_whose_number_the_graph_does_not_know(op: str) -> None:
    """As MaskedLM's head gathers them: the words that were masked."""
    x, w = torch.randn(6, 8), torch.randn(8)
    keep, table, target = torch.rand(6) < 0.7, torch.randn(5, 8), torch.randint(5, (6,))
    calls = {
        "layer_norm": lambda rows, y: ops.layer_norm(y, w, w),
        "rms_norm": lambda rows, y: ops.rms_norm(y, w),
        "gelu": lambda rows, y: ops.gelu(y),
        "softmax": lambda rows, y: ops.softmax(y),
        "linear_cross_entropy": lambda rows, y: ops.linear_cross_entropy(y, table, target[rows], reduction="none"),
    }

    def of_rows(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        rows = keep.nonzero().squeeze(1)
        return calls[op](rows, x.index_select(0, rows))

    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(of_rows, fullgraph=True, backend="aot_eager")
    found = [function(leaf, keep) for function, leaf in zip((of_rows, compiled), leaves, strict=True)]
    for y in found:
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["dropout", "dropout_add", "add_layer_norm", "add_rms_norm"])
def test_a_refused_call_draws_no_seed(op: str) -> None:
    x = torch.randn(3, 8)
    before = torch.get_rng_state()
    with pytest.raises(NotImplementedError):
        getattr(ops, op)(*([x] if op == "dropout" else [x, x]), dropout=0.5, backend="cuda")
    assert torch.equal(torch.get_rng_state(), before)
