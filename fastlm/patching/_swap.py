"""Another forward for a module that stays itself: the same object, parameters, buffers, hooks, names and mode.

What changes is the module's class, to one derived from its own: `__class__` is the only part of a module that its state
dict, its hooks and an optimizer do not know. An attribute `forward` of the instance would do too, but a copy of such a
model (copy.deepcopy, pickle, torch.save) would call the forward of the model it was copied from.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn

STATE = "_fastlm_"
"""Attributes that a derived forward keeps on its module begin so; restore() removes them."""
ENABLED = f"{STATE}enabled"
"""What fastlm.hf.enable leaves on its model."""


@cache
def derive(original: type, layer: type) -> type:
    """The class of `original` modules that run `layer`'s forward: a class with the original's name, below both.

    Args:
        layer: a subclass of original (fastlm.nn.LayerNorm of torch.nn.LayerNorm), or a class of methods alone that go
            before those of original.
    """
    bases = (layer,) if issubclass(layer, original) else (layer, original)
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_fastlm_swapped": (original, layer),
    }
    return type(original.__name__, bases, names)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__.copy()
    return _make, type(self)._fastlm_swapped, state


def _make(original: type, layer: type) -> Any:
    kind: Any = derive(original, layer)
    return kind.__new__(kind)


def swap(module: nn.Module, layer: type) -> None:
    """The module runs layer's forward from now on."""
    kind: Any = derive(cast(Any, type(module)), layer)
    module.__class__ = kind


def swapped(module: nn.Module) -> type | None:
    """The layer whose forward the module was given, or None."""
    pair = getattr(type(module), "_fastlm_swapped", None)
    return None if pair is None else pair[1]


def own(kind: type) -> type:
    """The class that a module of this class had before swap()."""
    pair = vars(kind).get("_fastlm_swapped")
    return kind if pair is None else own(pair[0])


def restore(module: nn.Module) -> bool:
    """Undoes swap(); False where there was none."""
    if swapped(module) is None:
        return False
    module.__class__ = _beneath(type(module))
    for name in [name for name in module.__dict__ if name.startswith(STATE)]:
        delattr(module, name)
    return True


def _beneath(kind: type) -> type:
    """The class without the layer. Others change classes too: a class that torch.nn.utils.parametrize or fully_shard
    has put above ours in the meantime is made again, above the original."""
    pair = vars(kind).get("_fastlm_swapped")
    if pair is not None:
        original: type = pair[0]
        return original
    bases = tuple(_beneath(base) if hasattr(base, "_fastlm_swapped") else base for base in kind.__bases__)
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, names)
