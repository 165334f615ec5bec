"""The plan of adam (csrc/cuda/adam.cpp): launches, instances, chunks; and the end of tensors beyond 2^32 elements."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fastlm import cuda
from fastlm._walk import ROWS, address_of
from fastlm.cuda import DTYPES
from fastlm.cuda import adam as backend
from fastlm.reference import adam as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMS, CHUNK, LONG = 132, 2048, 8192
AT = 1 << 20  # an address


@pytest.fixture(autouse=True)
def large_chip() -> Iterator[None]:
    cuda.extension().emulate("forward", sms=SMS)
    yield
    cuda.extension().record(False)
    cuda.extension().tail(0)
    cuda.extension().emulate("forward")


def start(
    rows: dict[str, Sequence[int]], grads: Sequence[int], *, dtype: torch.dtype = F32, grad: torch.dtype | None = None,
    scalars: int = AT, stochastic: bool = False, lr: float = 1e-3,
) -> None:  # fmt: skip
    count = len(grads)
    table = array("q", [value for name in ROWS for value in rows.get(name, [0] * count)])
    addresses = array("q", grads)
    cuda.extension().adam_step(
        DTYPES[dtype], DTYPES[grad or dtype], DTYPES[BF16], address_of(table), address_of(addresses), count, scalars,
        lr, 0, False, 0.9, 0.999, 1e-8, 0.0, False, False, 0, False, 0, False, stochastic, 0, 0,
    )  # fmt: skip


def launches(
    sizes: Sequence[int], also: Sequence[str] = (), *, dtype: torch.dtype = F32, grad: torch.dtype | None = None
) -> list[tuple[str, int]]:
    """Instance and blocks of each launch for tensors of these sizes, with these rows beside those always there."""
    extension = cuda.extension()
    extension.record(True)
    used = ("step", "param", "exp_avg", "exp_avg_sq", *also)
    rows: dict[str, Sequence[int]] = {name: [AT] * len(sizes) for name in used} | {"size": sizes}
    start(rows, [AT] * len(sizes), dtype=dtype, grad=grad, stochastic="seed" in also)
    recorded = extension.records()
    extension.record(False)
    for op, code, name, _, y, threads, cluster, shared in recorded:
        assert (op, code, y, cluster) == ("adam", DTYPES[dtype], 1, 1)
        assert threads == (128 if name == "adam_begin_0" else 256)
        assert shared == (2048 if "codes" in name else 0)
    return [(name, x) for _, _, name, x, *_ in recorded]


def test_nothing_is_launched_for_nothing() -> None:
    assert launches([]) == []
    assert launches([0]) == [("adam_begin_0", 1), ("adam_step_0", 0)]  # a step is counted
    assert launches([0, 1, 0]) == [("adam_begin_0", 1), ("adam_step_0", 1)]


@pytest.mark.parametrize(("also", "most"), [((), 91), (("max_exp_avg_sq", "shadow_param"), 66)])
def test_launches_of_300_tensors(also: tuple[str, ...], most: int) -> None:
    found = launches([CHUNK + 1] * 300, also)
    assert found[0] == ("adam_begin_0", 3)
    counts = [most] * (300 // most) + [300 % most]
    assert found[1:] == [("adam_step_0", 2 * n) for n in counts]
    many = launches([1] * 1000)
    assert [x for name, x in many if name == "adam_begin_0"] == [3, 3, 2]
    assert sum(x for name, x in many if name == "adam_step_0") == 1000


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_instances(dtype: torch.dtype) -> None:
    codes = ("exp_avg_absmax", "exp_avg_sq_absmax")
    for i, also in enumerate(((), ("master_param",), ("seed",))):
        for wide, grad in enumerate((dtype, F32)):
            assert launches([9], also, dtype=dtype, grad=grad)[1][0] == f"adam_step_{2 * i + wide}"
            assert launches([9], (*also, *codes), dtype=dtype, grad=grad)[1][0] == f"adam_codes_{2 * i + wide}"
    assert launches([9], codes)[1][0] == "adam_codes_0"


def test_chunks() -> None:
    """Short ones until every multiprocessor has several long ones."""
    few, many = 16 * SMS * LONG - 1, 16 * SMS * LONG
    assert launches([few])[1] == ("adam_step_0", -(-few // CHUNK))
    assert launches([many])[1] == ("adam_step_0", many // LONG)
    assert launches([1, many, 5])[1] == ("adam_step_0", many // LONG + 2)


def test_launches_beyond_31_bits() -> None:
    assert launches([2**31 + 1])[1] == ("adam_step_0", 2**31 // LONG + 1)
    assert launches([2**40, 3])[1] == ("adam_step_0", 2**40 // LONG + 1)


def test_norm() -> None:
    extension = cuda.extension()

    def norm(sizes: Sequence[int]) -> list[tuple[str, int]]:
        grads, counts = array("q", [AT] * len(sizes)), array("q", sizes)
        extension.record(True)
        extension.adam_norm(0, address_of(grads), address_of(counts), len(sizes), AT, AT, 0, 0)
        found = [(name, x) for _, _, name, x, *_ in extension.records()]
        extension.record(False)
        return found

    chunk, total = backend.NORM_CHUNK, ("adam_total_0", 1)
    assert norm([]) == [total]
    assert norm([0, chunk, chunk + 1]) == [("adam_squares_0", 3), total]
    assert norm([5] * 300) == [("adam_squares_0", 200), ("adam_squares_0", 100), total]
    assert norm([2**33 + 1]) == [("adam_squares_0", 2**33 // chunk + 1), total]


def test_many_tensors_in_several_launches() -> None:
    """Each tensor gets its own step, whichever launch it is in."""
    shapes = [(i % 7,) for i in range(400)]
    lists = [[torch.randn(s) for s in shapes] for _ in range(2)]
    params, grads = lists
    moments = [[torch.zeros(s) for s in shapes] for _ in range(4)]
    steps = [[torch.tensor(float(i % 5)) for i in range(400)] for _ in range(2)]
    expected = [p.clone() for p in params]
    prepared = backend.Prepared(params, *moments[:2], steps[0], [], [], [], [], [])
    other = reference.Prepared(expected, *moments[2:], steps[1], [], [], [], [], [])
    for module, tensors in ((backend, prepared), (reference, other)):
        module.forward(tensors, grads, 1e-2, 0.9, 0.999, 1e-8, 0.1, True, False, None, None)  # type: ignore[arg-type]
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)
    assert [s.item() for s in steps[0]] == [i % 5 + 1 for i in range(400)]


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
@pytest.mark.parametrize(("dtype", "stochastic"), [(F32, False), (BF16, True)], ids=["float32", "stochastic"])
def test_the_end_of_a_tensor_beyond_32_bits(order: str, dtype: torch.dtype, stochastic: bool) -> None:
    """Of 2^33 elements memory holds the last ones alone, and the blocks before them do not run."""
    before, n = 1 << 33, LONG + 700
    param, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    whole = [param.clone(), torch.zeros(n), torch.zeros(n), torch.zeros(())]
    tail = [t.clone() for t in whole]
    prepared = backend.Prepared(*[[t] for t in whole], [], [], [1000] if stochastic else [], [], [])
    backend.forward(prepared, [grad], 1e-2, 0.9, 0.999, 1e-8, 0.0, False, False, None, None)

    def back(tensor: Tensor) -> int:
        return tensor.data_ptr() - before * tensor.element_size()

    cuda.extension().emulate(order, sms=SMS)
    cuda.extension().tail(2)
    scalars = torch.empty(8)
    rows = {
        "size": [before + n], "step": [tail[3].data_ptr()], "param": [back(tail[0])], "exp_avg": [back(tail[1])],
        "exp_avg_sq": [back(tail[2])], "seed": [1000 if stochastic else 0],
    }  # fmt: skip
    start(rows, [back(grad)], dtype=dtype, scalars=scalars.data_ptr(), stochastic=stochastic, lr=1e-2)
    assert torch.equal(tail[1], whole[1]) and torch.equal(tail[2], whole[2]) and tail[3] == 1
    if stochastic:  # the bits depend on the upper half of the index too
        assert not torch.equal(tail[0], whole[0])
        torch.testing.assert_close(tail[0], whole[0], rtol=2**-7, atol=0)
    else:
        assert torch.equal(tail[0], whole[0])
