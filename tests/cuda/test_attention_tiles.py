"""attention over several tiles of keys and of queries, on both paths: as accurate as the rule says, and the same bits
in whatever order blocks and threads run, though several blocks add to one tile of dq."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops
from tests import emulation
from tests.ops.attention_oracle import Case, expect, make_problem
from tests.ops.harness import assert_same_bits, on

CASES = {
    Case(1, 2, 1, 140, 270, 64, 64): torch.bfloat16,
    Case(1, 1, 1, 150, 260, 40, 64, "bottom-right"): torch.float16,
    Case(1, 1, 1, 260, 140, 64, 24, "top-left"): torch.bfloat16,
    Case(1, 1, 1, 260, 260, 64, 64, window=(120, 30)): torch.bfloat16,
    Case(1, 2, 1, 70, 260, 128, 104, "top-left"): torch.bfloat16,  # keys that no query sees
    Case(1, 1, 1, 130, 260, 128, 128, window=(100, None)): torch.float16,
    Case(1, 2, 1, 130, 140, 256, 200, "bottom-right"): torch.bfloat16,
    Case(1, 1, 1, 140, 130, 136, 256, window=(70, 20)): torch.float16,
}


@pytest.mark.parametrize("chip", ["80", "90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_order(case: Case, chip: str) -> None:
    problem = make_problem(case, CASES[case])
    expected = expect(problem)
    results = []
    for order in emulation.ORDERS:
        with on(f"cuda-{order}-{chip}"):
            (out, lse), grads = problem.run(lambda *x, **options: ops.attention(*x, return_lse=True, **options))
        results.append([out, lse, *grads])
    expected.assert_matched(out, lse, problem.names(), grads)
    for result in results[:-1]:
        assert_same_bits(result, results[-1])
