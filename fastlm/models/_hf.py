"""Folders of transformers (config.json, model.safetensors), read and written without transformers itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlm.models._files import CONFIG, WEIGHTS, load_config, open_weights, save_folder

INDEX = f"{WEIGHTS}.index.json"


class HFWeights:
    """The tensors of a transformers model, taken one by one; what nobody took is an error.

    Args:
        state: by name.
        prefix: what a model with a head puts before the names of its base model, and a base model alone does not.
    """

    def __init__(self, state: dict[str, Tensor], prefix: str) -> None:
        self._state = {name.removeprefix(prefix): tensor.detach() for name, tensor in state.items()}
        self._left = set(self._state)

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: it is missing or has another shape.
        """
        if name not in self._state:
            raise ValueError(f"the model has no {name}; it has {', '.join(sorted(self._left)[:5])} ...")
        self._left.discard(name)
        tensor = self._state[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} by the config, got {tuple(tensor.shape)}")
        return tensor

    def finish(self, *ignored: str) -> None:
        """Raises ValueError for what was not taken, but for names that end as the ignored."""
        rest = sorted(name for name in self._left if not name.endswith(ignored))
        if rest:
            raise ValueError(f"the model has {len(rest)} tensors with no place here: {', '.join(rest[:5])}")


def read_model(source: str | os.PathLike[str] | nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a transformers model.

    Args:
        source: a folder with config.json and model.safetensors, whole or in shards with an index; or a
            transformers.PreTrainedModel.

    Raises:
        FileNotFoundError: folder or file missing. ValueError: a file is damaged.
    """
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        if not hasattr(config, "to_dict"):
            raise TypeError(f"source must be a folder or a transformers model, got {type(source).__name__}")
        values = {**config.to_dict(), "architectures": [type(source).__name__]}
        return values, dict(source.state_dict())
    folder = Path(source)
    config = load_config(folder)
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from None
    elif not (folder / WEIGHTS).is_file() and (folder / "pytorch_model.bin").is_file():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}, only pytorch_model.bin: save it anew with save_pretrained of transformers"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        state.update(open_weights(folder, name)[0])
    return config, state


def write_model(folder: str | os.PathLike[str], config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Writes what transformers' from_pretrained reads, each file whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    dtypes = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}
    config = {**config, "dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    # Parts of one matrix would be views that share memory, which the format has no way to say.
    save_folder(folder, {name: t.detach().clone() for name, t in state.items()}, config, {"format": "pt"})


def require(config: dict[str, Any], **allowed: Any) -> None:
    """Refuses a config whose fields ask for what the model here has not.

    Args:
        allowed: field and the tuple of values that will do; a field that is absent will do.

    Raises:
        ValueError: names field, value and what is allowed.
    """
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{name} of the transformers config must be {_either(values)}, got {config[name]!r}")


def fields(config: dict[str, Any], *names: str) -> list[Any]:
    """Fields that must be there.

    Raises:
        ValueError: one is not.
    """
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"{CONFIG} of a {config.get('model_type')} model must have {', '.join(missing)}")
    return [config[name] for name in names]


def one_dropout(config: dict[str, Any], *names: str) -> float:
    """The models here have one probability of dropout. Raises ValueError where the fields differ."""
    found = {name: float(config.get(name) or 0.0) for name in names}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{', '.join(f'{k}={v}' for k, v in found.items())}: one probability of dropout is all there is"
        )
    return next(iter(found.values()))


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
