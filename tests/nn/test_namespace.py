"""`from fastlm import nn` in place of `from torch import nn`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import fastlm.nn.functional as F
from fastlm import nn, ops


def test_everything_of_torch_nn_is_there() -> None:
    for ours, theirs in ((nn, torch.nn), (F, torch.nn.functional)):
        missing = [name for name in dir(theirs) if not name.startswith("_") and not hasattr(ours, name)]
        assert not missing and set(dir(theirs)) <= set(dir(ours))
    assert nn.Module is torch.nn.Module and nn.init is torch.nn.init and F.relu is T.relu
    assert nn.utils.rnn.pad_sequence is torch.nn.utils.rnn.pad_sequence
    assert nn.functional is F and nn.Linear is not torch.nn.Linear


def test_a_name_that_neither_has_says_so() -> None:
    with pytest.raises(AttributeError, match="Transfomer"):
        _ = nn.Transfomer
    with pytest.raises(AttributeError, match="no_such"):
        _ = F.no_such
    with pytest.raises(ImportError, match="Transfomer"):
        from fastlm.nn import Transfomer  # noqa: F401


def test_the_ways_to_import_it() -> None:
    code = (
        "import fastlm.nn as nn, fastlm.nn.functional as F\n"
        "from fastlm.nn import ModuleList, Parameter, TransformerEncoder, init\n"
        "assert nn.Sequential and F.pad and ModuleList is nn.ModuleList and TransformerEncoder is nn.TransformerEncoder"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- small layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GELU", ()),
        ("GELU", ("tanh",)),
        ("Softmax", (-1,)),
        ("Softmax", (0,)),
        ("LogSoftmax", (1,)),
        ("LogSoftmax", (-1,)),
    ],
)
def test_activations(name: str, arguments: tuple) -> None:
    ours, theirs = getattr(nn, name)(*arguments), getattr(torch.nn, name)(*arguments)
    assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs))
    x, dy = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, x, dy), torch.autograd.grad(expected, x, dy))


def test_softmax_without_a_dimension_warns_where_torch_does() -> None:
    where = []
    for namespace in (torch.nn, nn):
        with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
            namespace.Softmax()(torch.randn(2, 3))
        where.append((caught[0].filename, caught[0].lineno))
    assert where[0] == where[1]


@pytest.mark.parametrize("bad", [(torch.ones(3, dtype=torch.int64), "none"), (torch.ones(3), "sigmoid")])
def test_gelu_refuses_what_torch_refuses(bad: tuple[Tensor, str]) -> None:
    for function in (T.gelu, F.gelu):
        with pytest.raises(RuntimeError):
            function(bad[0], approximate=bad[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    inner = ops.dropout
    monkeypatch.setattr(ops, "dropout", lambda *a, **k: ran.append(True) or inner(*a, **k))
    layer, x = nn.Dropout(0.25), torch.ones(200, 300, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert ran and repr(layer) == repr(torch.nn.Dropout(0.25)) and y.dtype is dtype
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 0.01
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, y)
    assert layer.eval()(x) is x


def test_dropout_where_torch_serves() -> None:
    x = torch.ones(4, 5)
    for p in (0.0, 1.0):
        assert torch.equal(F.dropout(x, p), T.dropout(x, p))
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(torch.tensor(1.0), 0.5) in (0.0, 2.0)
    assert nn.Dropout(0.5, inplace=True)(x) is x and set(x.unique().tolist()) == {0.0, 2.0}
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        F.dropout(x, 1.5)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        nn.Dropout(-0.1)
