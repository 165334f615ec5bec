"""Patched models inside what people wrap around models: copies, torch.compile, parallel wrappers, parametrizations."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

import fastlm
from fastlm.patching import swapped
from tests.patching.test_patch import error, run
from tests.patching.zoo import Llama, build, inputs


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama", "translator", "own transformer"])
def test_a_copy_is_patched_and_can_be_unpatched(name: str, how: str) -> None:
    model, classes = build(name), [type(m) for m in build(name).modules()]
    stock = run(model, name)
    fastlm.patch(model)
    patched = run(model, name)
    double = COPIES[how](model)
    assert [swapped(m) for m in double.modules()] == [swapped(m) for m in model.modules()]
    fastlm.unpatch(model)
    assert all(torch.equal(value, patched[key]) for key, value in run(double, name).items())
    fastlm.unpatch(double)
    assert [type(m) for m in double.modules()] == classes
    assert all(torch.equal(value, stock[key]) for key, value in run(double, name).items())


def test_the_state_dict_is_stock_s_and_loads_both_ways(tmp_path: Path) -> None:
    stock, patched = build("classifier"), build("classifier")
    fastlm.patch(patched)
    torch.save(patched.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(saved) == list(stock.state_dict())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in saved.items())
    for model in (stock, patched):
        assert not any(model.load_state_dict(saved))


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_model_runs_what_it_is_patched_with(inside: bool) -> None:
    """A graph compiled before is not run after."""
    model, counter = build("llama"), CompileCounter()
    data, targets = inputs("llama")
    compiled = torch.compile(model, backend=counter)
    expected = compiled(data, targets)[1]
    assert counter.frame_count == 1
    report = fastlm.patch(model if inside else compiled)
    assert report.replaced
    assert all(entry.name.startswith("_orig_mod.") is not inside for entry in report.replaced)
    patched = compiled(data, targets)[1]
    assert counter.frame_count == 2 and torch.equal(patched, model(data, targets)[1])
    assert error(patched, expected) <= 1e-5
    fastlm.unpatch(compiled)
    assert torch.equal(compiled(data, targets)[1], expected)
    torch._dynamo.reset()


def test_the_patched_forward_is_one_graph() -> None:
    model = build("llama")
    data, targets = inputs("llama")
    fastlm.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, logits = compiled(data, targets)
    loss.backward()
    assert error(logits, model(data, targets)[1]) <= 1e-6
    torch._dynamo.reset()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(group: None) -> None:
    model, stock = build("llama"), run(build("llama"), "llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = fastlm.patch(wrapped)
    assert report.replaced and all(entry.name.startswith("module.") for entry in report.replaced)
    for key, value in run(wrapped, "llama").items():
        assert error(value, stock[key.removeprefix("module.")]) <= 1e-5, key
    fastlm.unpatch(wrapped)
    for key, value in run(wrapped, "llama").items():
        assert torch.equal(value, stock[key.removeprefix("module.")]), key


def test_data_parallel_s_replicas() -> None:
    model = build("llama")
    fastlm.patch(model)
    replica = model.blocks[0].mlp._replicate_for_data_parallel()  # type: ignore[index, union-attr, operator]
    x = torch.randn(2, 32)
    assert torch.equal(replica(x), model.blocks[0].mlp(x))  # type: ignore[index, union-attr, operator]


def shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    assert isinstance(model, Llama)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # its logits are a view, patched or not
def test_a_sharded_model(group: None) -> None:
    """Layers with sharded weights are left; those that only call others run."""
    model, stock = build("llama"), run(build("llama"), "llama")
    shard(model)
    report = fastlm.patch(model)
    assert {(e.name, e.reason) for e in report.left} >= {("blocks.0.norm1", "its weight is a DTensor")}
    assert {entry.name for entry in report.replaced} == {"blocks.0.mlp", "blocks.1.mlp", "criterion"}
    found = run(model, "llama")
    assert error(found["logits"], stock["logits"]) <= 1e-5
    assert error(found["blocks.0.mlp.w1.weight"].full_tensor(), stock["blocks.0.mlp.w1.weight"]) <= 1e-5  # type: ignore[attr-defined]
    fastlm.unpatch(model)
    assert torch.equal(run(model, "llama")["logits"], stock["logits"])


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # its logits are a view, patched or not
def test_sharded_after_patching(group: None) -> None:
    model, stock = build("llama"), run(build("llama"), "llama")
    fastlm.patch(model)
    shard(model)
    assert error(run(model, "llama")["logits"], stock["logits"]) <= 1e-5
    fastlm.unpatch(model)
    assert torch.equal(run(model, "llama")["logits"], stock["logits"])


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("first", ["unpatch", "remove"])
def test_parametrized_after_patching(first: str) -> None:
    norm, stock, x = nn.LayerNorm(8), nn.LayerNorm(8), torch.randn(3, 8)
    fastlm.patch(norm)
    parametrize.register_parametrization(norm, "weight", Double())
    parametrize.register_parametrization(stock, "weight", Double())
    torch.testing.assert_close(norm(x), stock(x))

    def remove() -> None:
        for module in (norm, stock):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    if first == "remove":
        remove()
        assert isinstance(norm, fastlm.nn.LayerNorm)
    fastlm.unpatch(norm)
    assert torch.equal(norm(x), stock(x)) and isinstance(norm, nn.LayerNorm)
    assert not isinstance(norm, fastlm.nn.LayerNorm)
    if first == "unpatch":
        assert parametrize.is_parametrized(norm, "weight")
        remove()
    assert type(norm) is nn.LayerNorm and torch.equal(norm(x), stock(x))


def test_wrapped_by_another_package_after_patching() -> None:
    """accelerate, for one, keeps the forward it found on the module: the patched one."""
    model = build("llama")
    fastlm.patch(model)
    norm = model.norm
    found = norm.forward
    norm.forward = lambda x: found(x)  # type: ignore[method-assign, assignment]
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"norm was given a forward by someone else after patch"):
        fastlm.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    del norm.forward
    fastlm.unpatch(model)


def test_cast_frozen_and_moved_after_patching() -> None:
    models = build("llama"), build("llama")
    fastlm.patch(models[1])
    for model in models:
        model.double()
        model.norm.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    stock, found = run(models[0], "llama", torch.float64), run(models[1], "llama", torch.float64)
    assert found.keys() == stock.keys() and "norm.weight" not in found
    assert all(error(found[key], value) <= 1e-12 for key, value in stock.items())
    shapes = models[1].to("meta")(*(t.to("meta") for t in inputs("llama")))
    assert shapes[1].shape == stock["logits"].shape
