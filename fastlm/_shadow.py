"""Shadows: 16-bit copies of float32 parameters that an optimizer writes in its step, so that autocast casts nothing.

The optimizer owns them; find() gives them to whoever would cast, for as long as they are the parameter's rounding.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Shadow:
    """A copy of one parameter, and what the parameter looked like when it was written."""

    __slots__ = ("__weakref__", "_address", "_version", "copy", "param")

    def __init__(self, param: Tensor, dtype: torch.dtype) -> None:
        self.param = param  # kept alive, so that its id stays its own
        self.copy = param.detach().to(dtype, copy=True)
        self.written()
        _shadows[id(param)] = self

    def written(self) -> None:
        """The copy is the rounding of the parameter as it is now."""
        self._version, self._address = self.param._version, self.param.data_ptr()

    def valid(self) -> bool:
        """Whether nobody has written the parameter since, nor put other memory behind it."""
        return self.param._version == self._version and self.param.data_ptr() == self._address

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the copy still has the parameter's shape and device."""
        copy, param = self.copy, self.param
        return copy.dtype is dtype and copy.shape == param.shape and copy.device == param.device


_shadows: weakref.WeakValueDictionary[int, Shadow] = weakref.WeakValueDictionary()


def find(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The parameter's copy in this dtype, if it has one that is up to date. Not to be written.

    Noticed is what autograd notices: in-place operations on the parameter (load_state_dict, torch.nn.init, optimizers)
    and other memory (`p.data = ...`). Operations on `p.data` itself, as `p.data.mul_(2)`, are not.
    """
    shadow = _shadows.get(id(tensor)) if _shadows else None
    if shadow is None or shadow.copy.dtype is not dtype or not shadow.valid():
        return None
    return shadow.copy
