"""Writing and reading a model's folder so that a crash or a full disk never leaves half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Model = TypeVar("Model", bound="SavedModel")


class SavedModel(torch.nn.Module):
    """A model made of its config, which a folder can hold.

    Attributes:
        config_class: a dataclass with from_dict(); the constructor takes one, and keeps it as `config`.
    """

    config_class: ClassVar[Any]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes model.safetensors and config.json, each whole or not at all.

        Raises:
            OSError: the folder cannot be written or the disk is full; what was there stays whole.
        """
        save_folder(folder, self.state_dict(), asdict(cast(Any, self.config)))

    @classmethod
    def load(cls: type[Model], folder: str | os.PathLike[str], device: str = "cpu") -> Model:
        """The model that save() wrote.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: a file is truncated; weights and config do not belong together.
        """
        values = load_config(folder)
        make: Any = cls
        config = cls.config_class.from_dict(values)
        return cast(Model, load_weights(folder, values, lambda: make(config), device))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; at the end of the block it takes that name, or on an error is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def save_folder(
    folder: str | os.PathLike[str],
    state: dict[str, Tensor],
    config: dict[str, Any],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes model.safetensors, then config.json.

    Args:
        metadata: of the weights; None stands for the config, so that a pair of different runs is noticed.

    Raises:
        OSError: the folder cannot be written, or the disk is full. The files that were there stay whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, text = Path(folder), json.dumps(config, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as path, replacing(folder / CONFIG) as config_path:
        try:
            save_file({name: t.detach().contiguous() for name, t in state.items()}, path, metadata or {"config": text})
        except SafetensorError as error:  # its way of passing on an OSError
            raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error
        config_path.write_text(text)


def load_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: not a JSON object.
    """
    path = _existing(Path(folder), CONFIG)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object, but is truncated or something else: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def load_weights(
    folder: str | os.PathLike[str], config: dict[str, Any], make: Callable[[], torch.nn.Module], device: str
) -> torch.nn.Module:
    """The module make() builds, with the tensors of model.safetensors in place of its own.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated; saved with another config; tensors that do not match.
    """
    path = Path(folder) / WEIGHTS
    state, metadata = open_weights(folder, WEIGHTS, device)
    saved = json.loads(metadata.get("config", "null"))
    if saved is not None and saved != config:
        differing = sorted(k for k in {*saved, *config} if saved.get(k) != config.get(k))
        raise ValueError(
            f"{path} was saved with another config than {Path(folder) / CONFIG}: "
            + ", ".join(f"{k} is {saved.get(k)!r} there and {config.get(k)!r} here" for k in differing)
        )
    with torch.device("meta"):
        module = make()
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        wrong = [
            f"{name} is {found.get(name, 'missing')}, must be {expected.get(name, 'absent')}"
            for name in sorted({*expected, *found})
            if expected.get(name) != found.get(name)
        ]
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not match its config: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(state, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def open_weights(
    folder: str | os.PathLike[str], name: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is truncated.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(Path(folder), name)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; it must hold {CONFIG} and {WEIGHTS}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; it must hold {CONFIG} and {WEIGHTS}")
    return folder / name
