"""attention's masks: rows that see nothing, values that must not leak, logits far away."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops
from tests.ops.attention_oracle import INF, Case, check, each_backend, finest, formula, make, near, taken
from tests.ops.harness import assert_same_values, differentiate, on


@each_backend
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_strides(backend: str, kind: str) -> None:
    """Transposed, sliced and expanded masks are read in place."""
    tensors = make(Case(2, 2, 2, 70, 75, 16, 16), finest(backend))
    mask = torch.rand(2, 2, 70, 75) < 0.6 if kind == "bool" else torch.randn(2, 2, 70, 75)
    wide = torch.zeros(2, 2, 70, 80, dtype=mask.dtype)
    wide[..., 3:78] = mask
    with on(backend):
        expected = ops.attention(*tensors, mask=mask)
        for view in (
            mask.mT.contiguous().mT,
            wide[..., 3:78],
            mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        ):
            assert_same_values(backend, [ops.attention(*tensors, mask=view)], [expected])
        column = mask[:, :, :, 5:6]
        for narrow, full in ((mask[:1, :, :1], mask[:1, :, :1]), (column, column)):
            expected = ops.attention(*tensors, mask=full.expand(2, 2, 70, 75).contiguous())
            assert_same_values(backend, [ops.attention(*tensors, mask=narrow)], [expected])
            assert_same_values(backend, [ops.attention(*tensors, mask=narrow.expand(2, 2, 70, 75))], [expected])


@taken()
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_no_key(backend: str, dtype: torch.dtype, kind: str) -> None:
    tensors = make(Case(2, 2, 1, 70, 130, 32, 32), dtype)
    seen = torch.rand(2, 1, 70, 130) < 0.5
    seen[0, :, 3], seen[1, :, 60:], seen[:, :, :, 64:128] = False, False, False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -INF)
    with on(backend):
        (out, lse), grads = differentiate(lambda *x: ops.attention(*x, mask=mask, return_lse=True), tensors)
    assert bool((out[0, :, 3] == 0).all()) and bool((lse[1, :, 60:] == -INF).all())
    assert bool((grads[0][0, :, 3] == 0).all()) and bool((grads[2][:, :, 64:128] == 0).all())
    check(backend, tensors, seen)


@taken()
@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("kind", ["bool", "-inf", "causal"])
def test_hidden_nan_does_not_leak(backend: str, dtype: torch.dtype, bad: float, kind: str) -> None:
    case = Case(1, 2, 2, 80, 100, 32, 32, causal=kind == "causal")
    q, k, v = make(case, dtype)
    mask = None
    if kind == "causal":  # queries below 50 may not see it
        hidden = torch.arange(100) >= 50
    else:
        hidden = torch.rand(100) < 0.2
        mask = ~hidden if kind == "bool" else torch.zeros(100).masked_fill(hidden, -INF)
    clean_k, clean_v = k.clone(), v.clone()
    k[:, :, hidden], v[:, :, hidden] = bad, bad
    rows = 50 if kind == "causal" else 80
    upstream = torch.randn(1, 2, 80, 32)
    upstream[:, :, rows:] = 0
    run = lambda q, k, v: ops.attention(q, k, v, mask=mask, causal=case.causal)[:, :, :rows]  # noqa: E731
    with on(backend):
        out, grads = differentiate(run, [q, k, v])
        expected, expected_grads = differentiate(run, [q, clean_k, clean_v])
    torch.testing.assert_close(out[0], expected[0], **near(dtype))
    if kind != "causal":  # there, later queries do see it
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
        for grad, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, want, atol=tolerance, rtol=tolerance)


@taken()
def test_hidden_nan_does_not_leak_to_a_single_query(backend: str, dtype: torch.dtype) -> None:
    """One or two queries, as in generation with a cache, have a path of their own."""
    for case in (Case(2, 4, 2, 1, 130, 40, 24), Case(2, 4, 2, 2, 70, 64, 64)):
        q, k, v = make(case, dtype)
        mask = torch.rand(case.T) < 0.8
        out, _ = differentiate(lambda *x, m=mask: formula(*x, m)[0], [q.double(), k.double(), v.double()])
        k[:, :, ~mask], v[:, :, ~mask] = float("nan"), INF
        with on(backend):
            actual = ops.attention(q, k, v, mask=mask)
        torch.testing.assert_close(actual, out[0].to(dtype), atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


@each_backend
def test_visible_nan_does_reach_the_output(backend: str) -> None:
    q, k, v = make(Case(1, 1, 1, 70, 70, 16, 16), finest(backend))
    v[0, 0, 40, 3] = float("nan")
    with on(backend):
        out = ops.attention(q, k, v, causal=True)
        assert bool(out[0, 0, 40:, 3].isnan().all()) and bool(out[0, 0, :40].isfinite().all())
        k[0, 0, 20] = float("nan")
        assert bool(ops.attention(q, k, v)[0, 0].isnan().all())


@taken()
@pytest.mark.parametrize("shift", [-3e4, -200.0, 3e4])
def test_far_away_logits(backend: str, dtype: torch.dtype, shift: float) -> None:
    """lse far below -88 and far above 88; also logits that rise from tile to tile."""
    tensors = make(Case(1, 2, 2, 70, 192, 16, 16), dtype)
    mask = shift + torch.linspace(0, 60, 192).floor()
    with on(backend):
        out, grads = differentiate(lambda *x: ops.attention(*x, mask=mask), tensors)
    wide = [x.double() for x in tensors]
    oracle, oracle_grads = differentiate(lambda *x: formula(*x, mask.double())[0], wide)
    tolerance = max(torch.finfo(dtype).eps * 8, torch.finfo(torch.float32).eps * abs(shift))  # logits are float32
    for a, o in zip([*out, *grads], [*oracle, *oracle_grads], strict=True):
        assert (a.double() - o).abs().max() <= tolerance * o.abs().max()
