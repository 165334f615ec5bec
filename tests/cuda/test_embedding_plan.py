"""The plan of embedding (csrc/cuda/embedding.cpp), and offsets beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from fastlm import cuda, ops
from tests.ops.harness import far_apart, on

FLOAT32, BFLOAT16 = 0, 1
AT = 1 << 20  # an address that is a multiple of 16
Launch = tuple[str, int, int]  # kernel_variant, blocks, threads


def recorded(launcher: str, *arguments: object) -> list[Launch]:
    extension = cuda.extension()
    extension.record(True)
    try:
        getattr(extension, launcher)(*arguments, 0, 0)
        launches = extension.records()
    finally:
        extension.record(False)
    assert all((y, cluster) == (1, 1) for _, _, _, _, y, _, cluster, _ in launches)
    return [(name, blocks, threads) for _, _, name, blocks, _, threads, _, _ in launches]


def forward(
    m: int, v: int, n: int, *, dtype: int = BFLOAT16, weight: int = AT, weight_row: int = 0, y: int = AT
) -> list[Launch]:
    return recorded("embedding_forward", dtype, True, AT, weight, weight_row or n, y, m, v, n)


def backward(m: int, v: int, n: int, *, dtype: int = BFLOAT16, dy: int = AT, dy_row: int = 0) -> list[Launch]:
    return recorded(
        "embedding_backward", dtype, dy, dy_row or n, False, AT, AT, AT, AT, AT, m, v, n, -1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "rows", "threads"),
    [(8, 1024, 256), (64, 128, 256), (768, 10, 256), (4096, 2, 256), (4800, 1, 160), (8192, 1, 256)],
)
def test_threads_are_as_many_as_rows_of_a_block_need(n: int, rows: int, threads: int) -> None:
    """A thread copies 4 units of 16 bytes: at most 1024 to a block, of whole rows."""
    assert forward(3000, 100, n) == [("embedding_forward_1", -(-3000 // rows), threads)]


def test_wide_rows_are_copied_in_equal_parts() -> None:
    assert forward(3, 9, 8200) == [("embedding_forward_1", 3 * 2, 160)]  # 1025 units: 513 and 512
    assert forward(3, 9, 2**20) == [("embedding_forward_1", 3 * 128, 256)]


def test_few_ids_take_few_threads() -> None:
    assert forward(1, 50257, 768) == [("embedding_forward_1", 1, 32)]
    assert forward(2, 50257, 4096, dtype=FLOAT32) == [("embedding_forward_1", 2, 256)]


def test_unaligned_rows_are_copied_by_elements() -> None:
    one = [("embedding_forward_0", 50, 256)]  # 1000 units a row
    assert forward(50, 9, 1000, weight=AT + 2) == forward(50, 9, 1000, y=AT + 8) == one
    assert forward(50, 9, 1000, weight_row=1001) == one
    assert forward(50, 9, 1000, weight_row=1008) == forward(50, 9, 1000) == [("embedding_forward_1", 7, 256)]
    assert forward(50, 1, 1000, weight_row=1001) == forward(50, 9, 1000)  # the stride of an only row
    assert forward(50, 9, 1001) == [("embedding_forward_0", 50, 256)]


def test_grids_of_the_largest_tables() -> None:
    assert forward(2**33, 2**33, 8)[0][1] == 2**23
    assert backward(2**20, 2**31, 8)[1][1] == 2**31 // 512


def test_rows_of_the_gradient_share_blocks() -> None:
    """bfloat16: a lane adds two words, 8 lanes and more a row, and each row's lanes write two rows."""
    assert backward(127, 1000, 8) == [("embedding_pieces_1", 0, 256), ("embedding_sum_1", 2, 256)]  # one lane
    assert backward(1024, 1000, 64) == [("embedding_pieces_1", 8, 256), ("embedding_sum_1", 16, 256)]  # 8 lanes
    assert backward(1024, 1000, 768) == [("embedding_pieces_1", 16, 256), ("embedding_sum_1", 126, 256)]  # 2 x 48 words
    assert backward(1024, 1000, 4096) == [("embedding_pieces_1", 64, 256), ("embedding_sum_1", 504, 256)]


def test_the_order_of_sums_does_not_depend_on_addresses() -> None:
    for n in (8, 64, 1000, 4096):
        for dtype in (FLOAT32, BFLOAT16):
            even = backward(1024, 1000, n, dtype=dtype)
            odd = [(name[:-1] + "0", *grid) for name, *grid in even]
            assert backward(1024, 1000, n, dtype=dtype, dy=AT + 4) == odd
            assert backward(1024, 1000, n, dtype=dtype, dy_row=n + 1) == odd
            assert backward(1024, 1000, n, dtype=dtype, dy_row=n + 8) == even


def test_nothing_is_launched_for_no_elements() -> None:
    assert forward(5, 5, 0) == backward(5, 5, 0) == []


def test_offsets_beyond_32_bits() -> None:
    """Three rows 2^31 elements apart, of the table and of the upstream gradient; ids of a table of 2^32 rows."""
    apart = 2**31
    rows = torch.randn(3, 24).bfloat16()
    far = far_apart(2 * apart + 24).as_strided((3, 24), (apart, 1))
    far.copy_(rows)
    with on("cuda-forward"):
        ids = torch.tensor([2, 0, 1, 2, 1])
        assert torch.equal(ops.embedding(ids, far), rows[ids])
        table = torch.zeros(4, 24).bfloat16().requires_grad_()
        ids = torch.tensor([3, 0, 3])
        (grad,) = torch.autograd.grad(ops.embedding(ids, table), table, far)
        expected = torch.zeros(4, 24).index_add_(0, ids, rows.float()).bfloat16()
        assert torch.equal(grad, expected)
        many = far_apart(2**32 + 8).view(-1, 1)
        many[-1] = 7
        ids = torch.tensor([len(many) - 1, len(many), -1, 5])
        y = ops.embedding(ids, many).flatten()
        assert y[0] == 7 and y[1:3].isnan().all() and y[3] == 0


def test_keys_of_64_bits() -> None:
    """As a table of 2^31 rows and more sorts them: through the launchers, because its gradient would be large."""
    extension = cuda.extension()
    keys = torch.tensor([-(2**40), -1, 0, 0, 3, 3, 3, 4, 2**31, 2**40])
    starts = torch.full((6,), -1)
    extension.embedding_starts(True, keys.data_ptr(), starts.data_ptr(), len(keys), 5, 0, 0)
    assert starts.tolist() == [2, 4, 4, 4, 7, 8]
    keys = torch.full((256,), 2)
    dy, order, starts = torch.ones(256, 8), torch.arange(256), torch.tensor([0, 0, 0, 256])
    partial, dweight = torch.full((2, 8), torch.nan), torch.full((3, 8), torch.nan)
    at = [t.data_ptr() for t in (keys, order, starts, partial, dweight)]
    extension.embedding_backward(FLOAT32, dy.data_ptr(), 8, True, *at, 256, 3, 8, -1, 0, 0)
    assert torch.equal(partial, torch.full((2, 8), 128.0))
    assert torch.equal(dweight, torch.tensor([0.0, 0.0, 256.0])[:, None].expand(3, 8))
