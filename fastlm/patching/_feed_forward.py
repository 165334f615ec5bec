"""Feed-forward modules of any class, recognised by what their forward does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastlm import ops
from fastlm.nn._modules import unheard
from fastlm.patching import _layers
from fastlm.patching._swap import STATE, own
from fastlm.patching._trace import settings_of, trace, unchanged, weightless

PLAN = f"{STATE}plan"
_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_GATED: dict[str, Callable[..., Tensor]] = {
    "silu": ops.swiglu,
    "gelu": ops.geglu,
    "gelu_tanh": lambda gate, up=None: ops.geglu(gate, up, approximate="tanh"),
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
}


class Silent(NamedTuple):
    """A child whose forward the op stands for: nobody may listen to it, and it must be what it was."""

    name: str
    kind: type
    settings: tuple[tuple[str, Any], ...]


class Plan(NamedTuple):
    """What a module's forward was found to do; names are those of its children.

    form "gated":           after(activation(first(x)) * up(x))
    form "packed":          after(activation(gate) * up), gate and up being the halves of first(x)
    form "packed, up first" the same with the halves exchanged
    form "plain":           after(activation(first(x)))
    """

    form: str
    activation: str
    first: str
    up: str | None
    after: tuple[str, ...]
    silent: tuple[Silent, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def op(self) -> str:
        return "ops.gelu" if self.form == "plain" else "ops.swiglu" if self.activation == "silu" else "ops.geglu"

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still what was recognised. Children with weights may have become any others."""
        if not unchanged(module, self.settings) or _has_any_global_hook():
            return False
        for name, kind, settings in self.silent:
            child = module._modules.get(name)
            if child is None or own(type(child)) is not kind or not unheard(child) or not unchanged(child, settings):
                return False
        return True


class FeedForward:
    """The forward of a recognised module: it calls the children as before; activation and product are one op."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = cast(nn.Module, self)
        plan: Plan = getattr(module, PLAN)
        if kwargs or len(args) != 1 or not plan.holds(module):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        children: Any = module._modules
        y = _activate(plan, children[plan.first](*args), None if plan.up is None else children[plan.up](*args))
        for name in plan.after:
            y = children[name](y)
        return y


def _activate(plan: Plan, first: Tensor, up: Tensor | None) -> Tensor:
    """The op where it takes what came, else what the module computed: the children have run, and run once."""
    if plan.form == "plain":
        pays = not _layers.torch_s(first, _layers.gelu_limit(first, plan.activation == "gelu_tanh"))
        return (_PLAIN if pays else _TORCH)[plan.activation](first)
    pays = not _layers.torch_s(first, _layers.GLU if plan.form == "gated" else 2 * _layers.GLU)
    if up is None:
        if pays and plan.form == "packed" and first.shape[-1] % 2 == 0:
            return _GATED[plan.activation](first)
        halves = first.chunk(2, dim=-1)
        first, up = halves if plan.form == "packed" else halves[::-1]
    if pays and _layers.takes(up) and up.dtype is first.dtype and up.shape == first.shape and up.device == first.device:
        return _GATED[plan.activation](first, up)
    return _TORCH[plan.activation](first) * up


def recognise(module: nn.Module) -> Plan | None:
    """What a module of a user's class does, where it is one of Plan's forms; None where it is anything else.

    The forward is traced by torch.fx on a copy that shares the children, in both modes; what it reads of its own plain
    attributes is noted, so that a later change sends the call back to the original.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    if not 2 <= len(children) <= 6:
        return None
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return None
    weighted = [name for name, child in children.items() if not weightless(child)]
    if len(weighted) not in (2, 3):
        return None
    plans = {_plan(module, training) for training in (True, False)}
    plan = plans.pop()
    if plans or plan is None:
        return None
    called = {plan.first, plan.up, *plan.after}
    if not called.issuperset(weighted):
        return None
    silent = tuple(
        Silent(name, own(type(child)), settings_of(child)) for name, child in children.items() if name not in called
    )
    return plan._replace(silent=silent, settings=settings_of(module))


def _plan(module: nn.Module, training: bool) -> Plan | None:
    graph = trace(module, training)
    return None if graph is None else _Match(graph, module).plan()


class _Match:
    """Reads a graph from its output up. Every node must have its place in the form."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self.nodes, self.module = list(graph.nodes), module
        self.left = set(self.nodes)

    def plan(self) -> Plan | None:
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        output = self.nodes[-1]
        if len(inputs) != 1 or output.op != "output":
            return None
        self.left -= {inputs[0], output}
        node, after = output.args[0], []
        while isinstance(node, fx.Node) and self._activation(node) is None:
            step = self._call(node)
            if step is None:
                break
            after.append(step[0])
            node = step[1]
        found = self._middle(node, inputs[0])
        if found is None or self.left:
            return None
        return found._replace(after=tuple(reversed(after)))

    def _middle(self, node: Any, x: fx.Node) -> Plan | None:
        if not isinstance(node, fx.Node):
            return None
        act = self._activation(node)
        if act is not None:  # plain; a module's activation is replaced by itself
            first = self._call(act[1])
            plain = first is not None and first[1] is x and act[0] in _PLAIN and node.op == "call_function"
            self.left.discard(node)
            return Plan("plain", act[0], first[0], None, ()) if plain and first is not None else None
        if not _is(node, operator.mul, torch.mul, "mul") or len(node.args) != 2 or node.kwargs:
            return None
        self.left.discard(node)
        for gate, other in (node.args, node.args[::-1]):
            act = self._activation(gate)
            if act is not None and isinstance(other, fx.Node):
                self.left.discard(cast(fx.Node, gate))
                return self._gated(act[0], act[1], other, x)
        return None

    def _gated(self, activation: str, gate: fx.Node, up: fx.Node, x: fx.Node) -> Plan | None:
        if gate.target is operator.getitem and up.target is operator.getitem:
            halves, halves_too = gate.args[0], up.args[0]
            order = (gate.args[1], up.args[1])
            if halves is not halves_too or not isinstance(halves, fx.Node) or sorted(order) != [0, 1]:  # type: ignore[type-var]
                return None
            packed = _halved(halves)
            first = None if packed is None else self._call(packed)
            if first is None or first[1] is not x:
                return None
            self.left -= {gate, up, halves}
            return Plan("packed" if order == (0, 1) else "packed, up first", activation, first[0], None, ())
        left, right = self._call(gate), self._call(up)
        if left is None or right is None or left[1] is not x or right[1] is not x:
            return None
        return Plan("gated", activation, left[0], right[0], ())

    def _call(self, node: Any) -> tuple[str, Any] | None:
        """(child, its input) of a call of a direct child with one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        if node.target not in self.module._modules:
            return None
        self.left.discard(node)
        return str(node.target), node.args[0]

    def _activation(self, node: Any) -> tuple[str, fx.Node] | None:
        """(activation, its input)"""
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        name = None
        if node.op == "call_module":
            child = self.module._modules.get(str(node.target))
            if own(type(child)) is nn.SiLU:
                name = "silu"
            elif own(type(child)) is nn.GELU:
                name = _GELU.get(cast(nn.GELU, child).approximate)
        elif node.target is F.silu:
            name = "silu"
        elif node.target is F.gelu and len(node.args) == 1:
            name = _GELU.get(str(node.kwargs.get("approximate", "none")))
        return None if name is None else (name, node.args[0])


_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _is(node: fx.Node, *targets: Any) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _halved(node: fx.Node) -> Any:
    """What node cuts into two halves of its last dimension."""
    if not _is(node, torch.chunk, "chunk"):
        return None
    arguments = dict(zip(("input", "chunks", "dim"), node.args, strict=False)) | node.kwargs
    return arguments.get("input") if (arguments.get("chunks"), arguments.get("dim")) == (2, -1) else None
