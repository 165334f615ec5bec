"""Checkpoints: a folder that is whole or not there.

Its files:

    config.json, model.safetensors   the model, as its save() writes them
    tokenizer.json                   its tokenizer
    state.pt                         optimizer and generators; absent from best/, which is for use, not for resuming
    checkpoint.json                  step, loss, settings of the run, size and CRC-32 of every other file
"""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch

from fastlm.data import Tokenizer, atomic_folder, recover_folder

FILE = "checkpoint.json"
STATE = "state.pt"
FORMAT = "fastlm-checkpoint-1"


class Saves(Protocol):
    """A model that writes itself into a folder."""

    def save(self, folder: Path, /) -> None: ...


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def save_checkpoint(
    folder: str | Path,
    model: Saves,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; the one already there stays until the new one is complete on the disk.

    Args:
        meta: JSON values to keep: step, loss, settings.
        state: tensors, numbers and containers of them, for resuming.

    Raises:
        OSError: it could not be written; the one already there is untouched.
    """
    folder = Path(folder)
    try:
        with atomic_folder(folder) as temporary:
            model.save(temporary)
            tokenizer.save(temporary)
            if state is not None:
                with open(temporary / STATE, "wb") as file:
                    torch.save(state, file)
            files = {
                path.name: {"bytes": path.stat().st_size, "crc32": _crc(path)} for path in sorted(temporary.iterdir())
            }
            content = json.dumps({"format": FORMAT, **meta, "files": files}, indent=2) + "\n"
            (temporary / FILE).write_text(content, encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        kept = f"; the checkpoint there before, {folder}, is whole" if folder.exists() else ""
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"could not save {folder}: {error}{kept}") from error


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """checkpoint.json, after every file it lists has been found whole.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file is missing, truncated or damaged.
    """
    folder = Path(folder)
    recover_folder(folder)
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: {path} does not exist")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        files = dict(meta["files"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')!r}; this fastlm reads {FORMAT!r}")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{file} is truncated or damaged: {size} bytes, not {expected['bytes']}")
        if _crc(file) != expected["crc32"]:
            raise ValueError(f"{file} is damaged: its checksum does not fit")
    return dict(meta)


def read_state(folder: str | Path) -> dict[str, Any]:
    """What was given to save_checkpoint as `state`. Nothing in the file can run code.

    Raises:
        FileNotFoundError: the checkpoint is one for use, not for resuming.
        ValueError: the file is damaged.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} cannot be resumed from: it has no {STATE}; the folder last/ of a run has one"
        )
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint meant by a folder: itself, else its best/, else its last/.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint: folder {folder} does not exist")
    for candidate in (folder, folder / "best", folder / "last"):
        recover_folder(candidate)
        if (candidate / FILE).is_file():
            return candidate
    raise FileNotFoundError(f"no checkpoint in {folder}: neither {FILE} nor best/ nor last/ is there")
