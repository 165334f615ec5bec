"""The one place where a kernel is chosen.

Each op declares its backends in order of preference; each backend declares what it can take and answers
`reasons(request)`: an empty list means yes. A forced backend (the `backend=` argument, `use_backend`, or the
environment variable FASTLM_BACKEND, in this order) never falls back. The automatic choice warns once when it passes a
backend over and lands on the reference; FASTLM_STRICT=1 makes that an error.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
LOW_PRECISION = frozenset({torch.float32, torch.bfloat16, torch.float16})


class UnsupportedError(NotImplementedError):
    """The backend asked for cannot run this call; the message holds the request and every reason."""


class Request(NamedTuple):
    """What a call asks for. Sizes hold only what some backend limits: every new value is a new decision."""

    device: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...] = ()
    features: frozenset[str] = frozenset()
    """Options in use that some backend lacks, by the name of their argument."""

    def __str__(self) -> str:
        sizes = "".join(f", {name}={size}" for name, size in self.sizes)
        features = f", with {', '.join(sorted(self.features))}" if self.features else ""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}{sizes}{features}"


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One row of an op's table: where it lives and what it takes. None means any."""

    name: str
    module: str
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    """What it takes of a request's features."""
    missing: Callable[[], str | None] = _always
    """Why the backend cannot be used on this machine at all, or None."""
    unverified: bool = False
    """Its kernels have never run on a GPU: it is there for who asks for it, and never chosen automatically."""

    def reasons(self, request: Request) -> list[str]:
        """What speaks against running the request; empty means nothing. The reference takes every feature."""
        found = []
        absent = self.missing()
        if absent:
            found.append(absent)
        if self.devices is not None and request.device not in self.devices:
            found.append(f"device is {request.device}, not {' or '.join(sorted(self.devices))}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            found.append(f"dtype is {str(request.dtype).removeprefix('torch.')}, not one of {allowed}")
        for name, size in request.sizes:
            if name in self.limits and size > self.limits[name]:
                found.append(f"{name} is {size}, above the limit {self.limits[name]}")
        if self.name != "reference" and not request.features <= self.features:
            found.append(f"it has no {' and no '.join(sorted(request.features - self.features))}")
        return found

    def against(self, request: Request) -> list[str]:
        """What speaks against choosing it automatically."""
        return self.reasons(request) or (["unverified: it has never run on a GPU"] if self.unverified else [])

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


class Op:
    """An op's name and its table of backends, best first."""

    registry: dict[str, Op] = {}  # noqa: RUF012

    def __init__(self, name: str, *rows: Backend) -> None:
        self.name = name
        self.rows = {row.name: row for row in rows}
        self._choices: dict[tuple[object, ...], str] = {}
        self._modules: dict[str, ModuleType] = {}
        Op.registry[name] = self

    def select(
        self,
        tensor: torch.Tensor,
        backend: str | None = None,
        features: frozenset[str] = frozenset(),
        **sizes: int,
    ) -> str:
        """Name of the backend that runs a call with these features and sizes on this tensor.

        Raises:
            ValueError: no backend has the forced name.
            UnsupportedError: the forced backend cannot run the call.
        """
        forced = backend if backend is not None else _forced
        if torch.compiler.is_compiling():  # no cache and no warning inside a traced graph
            return self._choose(Request(tensor.device.type, tensor.dtype, tuple(sizes.items()), features), forced)[0]
        # What makes a request, as it comes: the request itself and the device's name would take half a microsecond.
        key = (tensor.device, tensor.dtype, features, forced, *sizes.items())
        choice = self._choices.get(key)
        if choice is None:
            request = Request(tensor.device.type, tensor.dtype, tuple(sizes.items()), features)
            choice, passed_over = self._choose(request, forced)
            if passed_over:
                warnings.warn(f"fastlm.{self.name} ({request}) runs on its PyTorch reference: {passed_over}",
                              stacklevel=3)  # fmt: skip
            self._choices[key] = choice
        return choice

    def _choose(self, request: Request, forced: str | None) -> tuple[str, str]:
        """The name, and why the automatic choice fell to the reference ('' when nothing else was expected)."""
        if forced is not None:
            check_name(forced)
            if forced not in self.rows:
                raise UnsupportedError(f"{self.name} has no backend {forced!r}, only {', '.join(self.rows)}")
            reasons = self.rows[forced].reasons(request)
            if reasons:
                raise UnsupportedError(f"backend {forced!r} cannot run {self.name} ({request}): {'; '.join(reasons)}")
            return forced, ""
        refusals = []
        for name, row in self.rows.items():
            reasons = row.against(request)
            if not reasons:
                break
            refusals.append(f"{name}: {'; '.join(reasons)}")
        # float64 and devices no backend serves (meta, mps) belong to the reference: nothing was passed over.
        served = any(
            row.devices is not None and request.device in row.devices and not row.unverified
            for row in self.rows.values()
        )
        expected = request.dtype is torch.float64 or not served
        if name != "reference" or expected or not refusals:
            return name, ""
        if _strict:
            raise UnsupportedError(
                f"FASTLM_STRICT=1 and only the reference can run {self.name} ({request}): {'; '.join(refusals)}"
            )
        return name, "; ".join(refusals)

    def explain(self, request: Request) -> dict[str, list[str]]:
        """For each backend, the reasons against the request; an empty list means it can run it."""
        return {name: row.reasons(request) for name, row in self.rows.items()}

    def why(self, request: Request) -> tuple[str, str]:
        """The backend that would run the request, and why it and not another, in words.

        Raises:
            UnsupportedError: a backend is forced that cannot run it.
        """
        name, _ = self._choose(request, _forced)
        if _forced is not None:
            return name, "asked for"
        refused = []
        for other, row in self.rows.items():
            if other == name:
                break
            refused.append(f"{other}: {'; '.join(row.against(request))}")
        return name, f"not {', not '.join(refused)}" if refused else "first choice"

    def module(self, name: str) -> ModuleType:
        """The module that holds the backend's forward() and backward()."""
        found = self._modules.get(name)
        if found is None:
            found = self._modules[name] = self.rows[name].load()
        return found


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op runs on the backend of this name, or raises; None gives the choice back.

    >>> with fastlm.use_backend("reference"):
    ...     loss = model(tokens).loss
    """
    global _forced
    if name is not None:
        check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


_forced: str | None = check_name(os.environ["FASTLM_BACKEND"]) if os.environ.get("FASTLM_BACKEND") else None
_strict: bool = _flag("FASTLM_STRICT")
