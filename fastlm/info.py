"""What is installed, what this machine can run, and what it cannot and why: `fastlm info`, `python -m fastlm.info`.

Needs torch and numpy alone, so that it also answers where the rest does not work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm import _malloc, cuda, native
from fastlm._dispatch import Op, Request
from fastlm.cuda import _binaries

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXTRAS = ("triton", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "tensorboard")


def collect() -> dict[str, Any]:
    """Everything `fastlm info` prints, in types that JSON has.

    ops[name][device][dtype] is {"chosen": backend or None, "why": text, "backends": {backend: [reasons against it]}}.
    """
    return {
        "versions": _versions(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_sets": {
                "compiled": native.built_isas(),
                "usable": native.isas(),
                "in_use": native.isa(),
                "missing": native.missing(),
            },
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": {"launchers": cuda.built(), "missing": cuda.missing(), **_binaries.describe()},
        "malloc": _malloc.describe(),
        "workspace": native.workspace_bytes(),
        "environment": {name: os.environ.get(name) for name in ("FASTLM_BACKEND", "FASTLM_STRICT")},
        "ops": {name: _op(op) for name, op in sorted(Op.registry.items())},
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": importlib.metadata.version("numpy"),
    }
    for name in EXTRAS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _op(op: Op) -> dict[str, Any]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, Any] = {}
    for device in devices:
        found[device] = {}
        for dtype in DTYPES:
            request = Request(device, dtype)
            try:
                chosen, why = op.why(request)
            except NotImplementedError as error:  # FASTLM_BACKEND forces one that cannot
                chosen, why = None, str(error)
            found[device][str(dtype).removeprefix("torch.")] = {
                "chosen": chosen,
                "why": why,
                "backends": op.explain(request),
            }
    return found


def render(info: dict[str, Any]) -> str:
    """The same as text, at most 100 columns where names allow."""
    lines = ["versions"]
    lines += [f"  {name:<12} {version or '-'}" for name, version in info["versions"].items()]
    cpu = info["cpu"]
    sets = cpu["instruction_sets"]
    lines += [
        "",
        "machine",
        f"  cpu          {cpu['model']}",
        f"  threads      {cpu['threads']} of {cpu['cores']} cores",
        f"  kernels for  {', '.join(sets['compiled']) or '-'}",
        f"  usable here  {', '.join(sets['usable']) or '-'}",
        f"  in use       {sets['in_use'] or 'none: ' + str(sets['missing'])}",
        f"  gpu          {', '.join(info['gpus']) or 'none that PyTorch sees'}",
        *_cuda(info["cuda"]),
        f"  malloc       {info['malloc']}",
        f"  workspace    {info['workspace'] / 1e6:.1f} MB kept for the scratch of CPU kernels in this process",
    ]
    lines += [f"  {name} = {value}" for name, value in info["environment"].items() if value]
    lines += ["", "ops: the backend chosen for each device and dtype, and why no other"]
    for name, devices in info["ops"].items():
        lines.append(f"  {name}")
        for device, dtypes in devices.items():
            for (chosen, refused), members in _grouped(dtypes).items():
                lines.append(f"    {device:<5} {chosen or 'nothing':<10} {', '.join(members)}")
                lines += [f"          not {reason}" for reason in refused]
    return "\n".join(lines)


def _cuda(cuda: dict[str, Any]) -> list[str]:
    """Launchers, the kernels in the package, and what compiles them at run time."""
    packaged, nvrtc = cuda["packaged"], cuda["nvrtc"]
    if packaged["nvcc"]:
        names = [*packaged["architectures"], *(f"{arch} as PTX" for arch in packaged["ptx"])]
        kernels = f"for {', '.join(names)}, by nvcc {packaged['nvcc']} ({packaged['seconds']:.0f} s)"
    else:
        kernels = f"none in the package: {packaged['reason'] or 'fastlm was not installed from here'}"
    compiler = f"NVRTC {nvrtc['version']}, {nvrtc['path']}" if nvrtc["path"] else f"none: {nvrtc['missing']}"
    return [
        f"  cuda         {'unusable: ' + cuda['missing'] if cuda['missing'] else 'usable'}",
        f"    launchers  {'built' if cuda['launchers'] else 'not built'}",
        f"    kernels    {kernels}",
        f"    compiler   {compiler}",
        f"    cache      {cuda['cache'] or 'none: there is no home directory'}",
    ]


def _grouped(dtypes: dict[str, Any]) -> dict[tuple[str | None, tuple[str, ...]], list[str]]:
    """Dtypes that fare alike, under what is chosen for them and what speaks against the others."""
    groups: dict[tuple[str | None, tuple[str, ...]], list[str]] = {}
    for dtype, row in dtypes.items():
        refused = tuple(f"{other}: {'; '.join(reasons)}" for other, reasons in row["backends"].items() if reasons)
        if row["chosen"] is None:
            refused = (row["why"],)
        groups.setdefault((row["chosen"], refused), []).append(dtype)
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastlm info",
        description="Shows versions, devices, instruction sets, and which backend runs which op and why.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
