"""Why a module is to be left alone, whatever its class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_PLAIN = (torch.int64, torch.int32, torch.bool)


def obstacle(module: nn.Module) -> str | None:
    """None where the module's forward may be replaced, else the reason why not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if "forward" in module.__dict__:
        return "its forward was replaced by someone else's"
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        reason = _unusual(tensor)
        if reason is not None:
            return f"its {name} {reason}"
    return None


def _unusual(tensor: Tensor) -> str | None:
    if nn.parameter.is_lazy(tensor):
        return "is not initialised yet"
    if tensor.is_meta:
        return "is on the meta device: load the weights first"
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.dtype in _PLAIN):
        return f"is quantised ({tensor.dtype})"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"is a {type(tensor).__name__}"
    return None
