"""fastlm.optim.Adam and AdamW beside torch's own: arguments, groups, state dicts, steps, clipping, scaling, resume."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm import optim
from fastlm.ops.adam import OP, dequantize
from tests.ops.harness import BACKENDS, GPU, assert_same_bits, each_backend, each_dtype, on, refuses, sizes

PAIRS = [(optim.Adam, torch.optim.Adam), (optim.AdamW, torch.optim.AdamW)]
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["Adam", "AdamW"])
OWN = {"max_norm", "master_weights", "stochastic_rounding", "state_bits", "shadow_dtype"}
SHAPES = [(3, 5), (), (0,), (70, 130), (9,)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(random(shape, generator).to(dtype)) for shape in SHAPES]


def random(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def give_gradients(*lists: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """The same gradients to every list; new tensors, as backward() makes them."""
    for params in lists:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = (random(p.shape, generator) * scale).to(p.dtype)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for group in optimizer.param_groups for p in group["params"] for v in optimizer.state[p].values()]


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@each_pair
def test_arguments_defaults_groups_and_repr_are_torchs(ours: Any, theirs: Any) -> None:
    mine, other = (inspect.signature(c.__init__).parameters for c in (ours, theirs))
    assert [n for n in mine if n not in OWN] == list(other)
    for name in other:
        assert (mine[name].default, mine[name].kind) == (other[name].default, other[name].kind), name
    a, b = ours(parameters()), theirs(parameters())
    assert isinstance(a, theirs)
    assert repr(a) == repr(b) and a.defaults == b.defaults
    assert [g.keys() for g in a.param_groups] == [g.keys() for g in b.param_groups]
    assert a.state_dict() == b.state_dict()


@each_backend
@each_pair
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"fused": True}, {"capturable": True}])
def test_steps_like_torch(backend: str, ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    mine, other = parameters(), parameters()
    reference = {k: v for k, v in options.items() if k != "capturable"}
    a, b = ours(mine, 1e-2, weight_decay=0.1, **options), theirs(other, 1e-2, weight_decay=0.1, **reference)
    for step in range(4):
        give_gradients(mine, other, seed=step)
        if step == 2:
            mine[0].grad = other[0].grad = None  # skipped: no step is counted
        with on(backend):
            a.step()
        b.step()
    torch.testing.assert_close(values(mine), values(other), rtol=3e-6, atol=3e-7)
    for p, q in zip(mine, other, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        torch.testing.assert_close(dict(a.state[p]), dict(b.state[q]), rtol=3e-6, atol=3e-7, check_device=False)


@each_pair
@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_dicts_load_both_ways(ours: Any, theirs: Any, saved_in: torch.dtype) -> None:
    mine, other = parameters(saved_in), parameters(saved_in)
    a, b = ours(mine, 1e-2, amsgrad=True), theirs(other, 1e-2, amsgrad=True)
    for step in range(3):
        give_gradients(mine, other, seed=step)
        a.step()
        b.step()

    def reload(source: torch.optim.Optimizer, cls: Any, params: list[nn.Parameter]) -> Any:
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        made = cls(params)
        made.load_state_dict(torch.load(buffer, weights_only=True))
        return made

    from_torch = reload(b, ours, copy.deepcopy(other))
    to_torch = reload(a, theirs, copy.deepcopy(mine))
    again = reload(a, ours, copy.deepcopy(mine))
    for loaded in (from_torch, to_torch, again):
        assert loaded.param_groups[0]["lr"] == 1e-2 and loaded.param_groups[0]["amsgrad"]
        for p in loaded.param_groups[0]["params"]:
            state = loaded.state[p]
            assert state["step"] == 3 and state["step"].dtype is torch.float32
            expected = saved_in if loaded is to_torch else torch.float32
            assert {state[k].dtype for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {expected}
    assert_same_bits(moments(again), moments(a))
    assert_same_bits(moments(from_torch), [t.to(u.dtype) for t, u in zip(moments(b), moments(from_torch), strict=True)])
    for loaded in (from_torch, to_torch):
        params = loaded.param_groups[0]["params"]
        give_gradients(params, seed=9)
        loaded.step()
        assert all(bool(p.isfinite().all()) for p in params)


def test_moments_in_bfloat16_and_back() -> None:
    """Of bfloat16 parameters alone; loading converts both ways."""
    params = [nn.Parameter(torch.randn(70, 130).to(d)) for d in (torch.bfloat16, torch.float32)]
    a = optim.AdamW(params, state_bits=16)
    give_gradients(params, seed=0)
    a.step()
    kinds = [{a.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")} for p in params]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    for bits, expected in ((32, torch.float32), (16, torch.bfloat16)):
        b = optim.AdamW(params, lr=0.0, state_bits=bits)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        saved = a.state[params[0]]["exp_avg"].clone()
        assert torch.equal(b.state[params[0]]["exp_avg"].to(torch.bfloat16), saved)
        b.step()
        assert b.state[params[0]]["exp_avg"].dtype is expected
    with pytest.raises(ValueError, match="state_bits must be 32, 16 or 8"):
        optim.AdamW(params, state_bits=4)


def test_user_hooks_run_around_our_own() -> None:
    params = parameters()
    a = optim.AdamW(params)
    give_gradients(params, seed=0)
    a.step()
    saved, seen = a.state_dict(), []

    def rename(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict["state"] = {int(k.removeprefix("p")): v for k, v in state_dict["state"].items()}
        return state_dict

    b = optim.AdamW(parameters())
    b.register_load_state_dict_pre_hook(rename)
    b.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    b.load_state_dict({**saved, "state": {f"p{k}": v for k, v in saved["state"].items()}})
    assert seen == [len(SHAPES)]
    assert_same_bits(moments(b), moments(a))
    order: list[str] = []
    b.register_step_pre_hook(lambda *_: order.append("before"))
    b.register_step_post_hook(lambda *_: order.append("after"))
    b.step()
    assert order == ["before", "after"]


@each_backend
@each_dtype
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_agrees_with_clip_grad_norm(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    mine, other = parameters(dtype), parameters(dtype)
    a, b = optim.AdamW(mine, 1e-2, max_norm=max_norm), optim.AdamW(other, 1e-2)
    for step in range(3):
        give_gradients(mine, other, seed=step, scale=step + 1.0)
        kept = [p.grad.clone() for p in mine]
        with on(backend):
            a.step()
            wide = [nn.Parameter(p.detach().float()) for p in other]  # torch would return the norm in bfloat16
            for w, p in zip(wide, other, strict=True):
                w.grad = p.grad.float()
            norm = nn.utils.clip_grad_norm_(wide, max_norm)
            for w, p in zip(wide, other, strict=True):
                p.grad = w.grad.to(dtype)
            b.step()
        assert a.grad_norm is not None and a.grad_norm.dtype is torch.float32
        torch.testing.assert_close(a.grad_norm, norm, rtol=1e-5, atol=0)
        assert_same_bits([p.grad for p in mine], kept)  # folded into the step, not written
    tolerance = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(values(mine), values(other), rtol=tolerance, atol=0.03 * tolerance)  # lr times steps


def test_one_norm_over_groups_dtypes_and_backends() -> None:
    params = [p for d in (torch.float32, torch.bfloat16, torch.float64) for p in parameters(d)]
    give_gradients(params, seed=1)
    expected = torch.cat([p.grad.double().flatten() for p in params]).norm()
    half = len(params) // 2
    a = optim.AdamW([{"params": params[:half], "weight_decay": 0.0}, {"params": params[half:]}], max_norm=1.0)
    a.step()
    assert a.grad_norm is not None
    torch.testing.assert_close(a.grad_norm.double(), expected, rtol=1e-6, atol=0)
    assert {a.state[p]["exp_avg"].dtype for p in params} == {torch.float32, torch.float64}
    empty = optim.AdamW(parameters(), max_norm=1.0)
    empty.step()
    assert empty.grad_norm == 0


@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_grad_scaler(max_norm: float | None) -> None:
    """Scaled gradients give the step of unscaled ones; an overflow changes nothing and lowers the scale."""
    mine, other = parameters(), parameters()
    a, b = optim.AdamW(mine, 1e-2, max_norm=max_norm), optim.AdamW(other, 1e-2, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        for params, factor in ((mine, 1024.0), (other, 1.0)):
            give_gradients(params, seed=step, scale=factor)
        scaler.scale(torch.ones(()))
        scaler.step(a)
        scaler.update()
        b.step()
    torch.testing.assert_close(values(mine), values(other), rtol=1e-6, atol=1e-7)
    if max_norm:
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    before, state = values(mine), [t.clone() for t in moments(a)]
    mine[3].grad[0, 0] = float("inf")
    scaler.step(a)
    scaler.update()
    assert_same_bits(values(mine), before)
    assert_same_bits(moments(a), state)
    assert scaler.get_scale() == 512.0 and not hasattr(a, "found_inf")


@each_backend
@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}, {}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_resume_is_exact(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    whole, first = parameters(dtype), parameters(dtype)
    with on(backend):
        torch.manual_seed(5)
        a = optim.AdamW(whole, 1e-3, max_norm=1.0, **options)
        for step in range(6):
            give_gradients(whole, seed=step)
            a.step()
        torch.manual_seed(5)
        b = optim.AdamW(first, 1e-3, max_norm=1.0, **options)
        for step in range(3):
            give_gradients(first, seed=step)
            b.step()
        buffer = io.BytesIO()
        torch.save({"params": values(first), "optimizer": b.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        torch.manual_seed(77)
        second = [nn.Parameter(p) for p in saved["params"]]
        c = optim.AdamW(second, max_norm=1.0, **options)
        c.load_state_dict(saved["optimizer"])
        for step in range(3, 6):
            give_gradients(second, seed=step)
            c.step()
    assert_same_bits(values(second), values(whole))
    assert_same_bits(moments(c), moments(a))


def test_masters_survive_a_visit_to_torch_and_new_weights() -> None:
    params = parameters(torch.bfloat16)
    a = optim.AdamW(params, 1e-3, master_weights=True)
    give_gradients(params, seed=0)
    a.step()
    assert a.state[params[0]]["master_param"].dtype is torch.float32
    b = torch.optim.AdamW(params, 1e-3)
    b.load_state_dict(a.state_dict())
    b.step()
    c = optim.AdamW(params, 1e-3, master_weights=True)
    c.load_state_dict(b.state_dict())
    with torch.no_grad():
        params[0].fill_(2.0)
    for group in c.param_groups:
        group["lr"] = 0.0
    before = values(params)
    c.step()
    assert_same_bits(values(params), before)
    assert bool((c.state[params[0]]["master_param"] == 2.0).all())
    norms = parameters()  # float32 parameters need no copy
    d = optim.AdamW(norms, master_weights=True, stochastic_rounding=False)
    give_gradients(norms, seed=0)
    d.step()
    assert "master_param" not in d.state[norms[0]]


def test_tensor_lr_and_betas_schedulers_and_closures() -> None:
    mine, other = parameters(), parameters()
    beta = (torch.tensor(0.8), torch.tensor(0.95))
    a = optim.AdamW(mine, torch.tensor(1e-2), beta)
    b = torch.optim.AdamW(other, 1e-2, (0.8, 0.95))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)) for o in (a, b)]

    def closure(params: list[nn.Parameter]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = sum((p.square().sum() for p in params), torch.zeros(()))
            for p in params:
                p.grad = None
            loss.backward()
            return loss

        return run

    for _ in range(3):
        torch.testing.assert_close(a.step(closure(mine)), b.step(closure(other)))
        for schedule in schedules:
            schedule.step()
    assert isinstance(a.param_groups[0]["lr"], Tensor)
    torch.testing.assert_close(values(mine), values(other), rtol=1e-5, atol=1e-6)
    a.zero_grad()
    assert all(p.grad is None for p in mine)


@each_backend
@each_pair
def test_tensor_lr_scheduled_and_scaled(backend: str, ours: Any, theirs: Any) -> None:
    """lr, grad_scale and found_inf as tensors, as a CUDA graph wants them."""
    mine, other = parameters(), parameters()
    lr, scale, found = torch.tensor(1e-2), torch.tensor(8.0), torch.tensor(0.0)
    a = ours(mine, lr, capturable=True, max_norm=1e6)
    b = theirs(other, 1e-2)
    with on(backend):
        for step in range(5):
            give_gradients(mine, seed=step, scale=8.0)
            give_gradients(other, seed=step)
            b.param_groups[0]["lr"] = 1e-2 / (step + 1)
            lr.fill_(1e-2 / (step + 1))
            a.grad_scale, a.found_inf = scale, found.fill_(float(step == 3))
            a.step()
            if step != 3:
                b.step()
    torch.testing.assert_close(values(mine), values(other), rtol=1e-5, atol=1e-6)
    assert all(a.state[p]["step"] == 4 for p in mine)


on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
each_kernel = pytest.mark.parametrize("kernels", [b for b in BACKENDS if b in ("triton", "cuda")] or ["triton"])


@on_gpu
@each_kernel
@pytest.mark.parametrize("bits", [32, 8])
def test_cuda_graph(kernels: str, bits: int) -> None:
    """A captured step reads lr, found_inf and gradients anew at each replay, with ordinary steps in between."""
    with torch.device("cuda"):
        mine, other = parameters(), parameters()
        lr, found = torch.tensor(1e-2), torch.zeros(())
    for p in mine:
        p.grad = torch.zeros_like(p)
    static = [p.grad for p in mine]
    a = optim.AdamW(mine, lr, capturable=True, max_norm=1.0, state_bits=bits)
    b = optim.AdamW(other, 1e-2, max_norm=1.0, state_bits=bits)
    a.found_inf = found

    def gradients(seed: int) -> None:
        give_gradients(other, seed=seed)
        for p, q, kept in zip(mine, other, static, strict=True):
            kept.copy_(q.grad)
            p.grad = kept

    with torch.device("cuda"), on(kernels):
        gradients(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            a.step()
        torch.cuda.current_stream().wait_stream(stream)
        b.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            a.step()
        for step in range(1, 6):
            lr.fill_(1e-2 / step)
            b.param_groups[0]["lr"] = 1e-2 / step
            gradients(step)
            if step == 3:  # not the graph, and gradients elsewhere
                for p in mine:
                    p.grad = p.grad.clone()
                a.step()
            else:
                graph.replay()
            b.step()
        assert_same_bits(values(mine), values(other))
        before = values(mine)
        found.fill_(1.0)
        graph.replay()
        assert_same_bits(values(mine), before)
        assert all(a.state[p]["step"] == 6 for p in mine)


@on_gpu
@each_kernel
def test_a_step_does_not_wait_for_the_gpu(kernels: str) -> None:
    with torch.device("cuda"), on(kernels):
        params = parameters(torch.bfloat16)
        a = optim.AdamW(params, torch.tensor(1e-3), max_norm=1.0, stochastic_rounding=True)
        for step in range(3):
            give_gradients(params, seed=step)
            a.grad_scale, a.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                a.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def eight_bits(params: list[nn.Parameter], **options: Any) -> optim.AdamW:
    return optim.AdamW(params, 1e-2, state_bits=8, **options)


def can(backend: str) -> bool:
    """Whether the backend has 8-bit states; else the optimizer must say so."""
    if not refuses(OP, backend, torch.empty(0), {"state_bits"}):
        return True
    params = parameters()
    give_gradients(params, seed=0)
    with on(backend), pytest.raises(fastlm.UnsupportedError, match="no state_bits"):
        eight_bits(params).step()
    return False


@each_backend
def test_8_bit_states_learn_as_32_bit_ones(backend: str) -> None:
    """A small network comes as far, with a quarter of the state."""
    if not can(backend):
        return
    (steps, lr), width = sizes((40, 2e-3), (10, 8e-3)), 64
    generator = torch.Generator().manual_seed(0)
    x, teacher = random((256, width), generator), random((width, 16), generator) / width**0.5
    y = torch.tanh(x @ teacher) + 0.05 * random((256, 16), generator)
    start = [random((width, 128), generator) / width**0.5, random((128, 16), generator) / 128**0.5]
    losses = []
    for bits in (32, 8):
        params = [nn.Parameter(t.clone()) for t in start]
        optimizer = optim.AdamW(params, lr, state_bits=bits)
        for _ in range(steps):
            loss = (torch.relu(x @ params[0]) @ params[1] - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            with on(backend):
                optimizer.step()
        losses.append(loss.item())
        large, small = optimizer.state[params[0]], optimizer.state[params[1]]
        assert (small["exp_avg"].dtype, small["exp_avg"].shape) == (torch.float32, (128, 16))
        held = sum(t.nbytes for t in large.values())
        assert held == (4 + 8192 * 8 if bits == 32 else 4 + 8192 * 2 + 32 * 8)
    assert losses[0] < 0.6 * (y - y.mean()).square().mean()
    assert abs(losses[1] / losses[0] - 1) < 0.03, losses


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_8_bit_states_saved_and_changed_to_32_bits_and_back(backend: str, dtype: torch.dtype) -> None:
    if not can(backend):
        return

    def reload(source: torch.optim.Optimizer, made: torch.optim.AdamW) -> torch.optim.AdamW:
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        made.load_state_dict(torch.load(buffer, weights_only=True))
        return made

    params = parameters(dtype)
    params[3].data = params[3].data.t().contiguous().t()
    with on(backend):
        a = eight_bits(params)
        for step in range(2):
            give_gradients(params, seed=step)
            a.step()
        same, wide, back = (copy.deepcopy(params) for _ in range(3))
        b = reload(a, eight_bits(same))
        assert_same_bits(moments(b), moments(a))
        assert b.state[same[3]]["exp_avg_codes"].dtype is torch.uint8
        c = reload(a, optim.AdamW(wide, 1e-2))
        d = reload(c, eight_bits(back))
        for optimizer in (a, b, c, d):
            own = optimizer.param_groups[0]["params"]
            give_gradients(own, seed=2)
            optimizer.step()
    assert_same_bits(values(same), values(params))
    assert_same_bits(moments(b), moments(a))
    with pytest.raises(KeyError, match="exp_avg"):  # torch does not take codes for moments
        reload(a, torch.optim.AdamW(params)).step()
    assert c.state[wide[3]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert d.state[back[3]].keys() == a.state[params[3]].keys()
    torch.testing.assert_close(values(wide), values(params), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(values(back), values(params), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    params[3].data = params[3].data.contiguous()  # the codes follow the parameter's layout
    state = a.state[params[3]]
    before = dequantize(state["exp_avg_codes"], state["exp_avg_absmax"], signed=True)
    for group in a.param_groups:
        group["lr"] = 0.0
    kept = values(params)
    for p in params:
        p.grad = None
    params[3].grad = torch.zeros_like(params[3])
    with on(backend):
        a.step()
    after = dequantize(state["exp_avg_codes"], state["exp_avg_absmax"], signed=True)
    assert after.is_contiguous() == (backend != "reference")  # which reads any order
    torch.testing.assert_close(after, 0.9 * before, rtol=0, atol=0.015 * before.abs().max().item())
    assert_same_bits(values(params), kept)


def test_parameters_that_move_and_state_that_is_replaced() -> None:
    mine, other = parameters(), parameters()
    a, b = optim.AdamW(mine, 1e-2), torch.optim.AdamW(other, 1e-2)

    def step(seed: int) -> None:
        give_gradients(mine, other, seed=seed)
        a.step()
        b.step()
        torch.testing.assert_close(values(mine), values(other), rtol=1e-5, atol=1e-6)

    step(0)
    mine[3].data = mine[3].data.clone()
    step(1)
    for o, params in ((a, mine), (b, other)):
        o.state[params[3]]["exp_avg"] = torch.zeros_like(params[3])
        del o.state[params[0]]
    step(2)
    for params in (mine, other):
        params[3].data = params[3].data.t().contiguous().t()  # now the state lies in another order
    step(3)
    for o in (a, b):
        o.add_param_group({"params": [nn.Parameter(torch.ones(4))], "lr": 0.5})
    step(4)
    for params in (mine, other):
        for p in params:
            p.data = p.data.double()
    for o in (a, b):
        o.load_state_dict(o.state_dict())
    step(5)


def test_copy_and_pickle_keep_the_options() -> None:
    params = parameters(torch.bfloat16)
    a = optim.AdamW(params, max_norm=2.0, master_weights=True)
    give_gradients(params, seed=0)
    a.step()
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert b.max_norm == 2.0 and b.master_weights and not b.stochastic_rounding
        own = b.param_groups[0]["params"]
        give_gradients(own, seed=1)
        b.step()
    give_gradients(params, seed=1)
    a.step()
    assert_same_bits(values(own), values(params))


def test_inside_torch_compile() -> None:
    torch._dynamo.reset()
    params = parameters()
    a = optim.AdamW(params, 1e-2)
    give_gradients(params, seed=0)
    before = values(params)
    torch.compile(a.step, backend="eager")()
    assert a.state[params[0]]["step"] == 1 and not torch.equal(params[0], before[0])


def test_what_raises_changes_nothing() -> None:
    for make, match in (
        (lambda: optim.AdamW(parameters(), differentiable=True), "torch.optim.AdamW"),
        (lambda: optim.Adam(parameters(), differentiable=True), "torch.optim.Adam"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            make()
    for options, match in (
        ({"max_norm": 0.0}, "max_norm must be above 0"),
        ({"max_norm": float("nan")}, "max_norm must be above 0"),
        ({"master_weights": True, "stochastic_rounding": True}, "exclude each other"),
        ({"state_bits": 4}, "state_bits must be 32, 16 or 8"),
        ({"lr": -1.0}, "learning rate"),
        ({"betas": (1.0, 0.9)}, "beta"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.AdamW(parameters(), **options)
    params = parameters()
    a = optim.AdamW(params)
    give_gradients(params, seed=0)
    before = values(params)
    params[3].grad = params[3].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        a.step()
    assert_same_bits(values(params), before)
    with pytest.raises(ValueError, match="state_bits=8 and amsgrad"):
        params = parameters()
        give_gradients(params, seed=0)
        eight_bits(params, amsgrad=True).step()
    z = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(fastlm.UnsupportedError, match="complex"):
        optim.AdamW([z]).step()
