"""README's tables, made of bench/results/cpu-*.json (python -m bench cpu --save), hf-*.json (python -m bench.bench_hf
--parts --save) and */results.json (python -m bench.gpu): `python -m bench.report` rewrites them and the drawings,
`--check` only compares the tables.

Ratios are the peer's median time over ours, taken in turn in one process, on a CPU both under the same malloc setting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.bench_hf import markdown as hf
from bench.cpu.tables import markdown as cpu
from bench.cpu.tables import plot
from bench.gpu.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: python -m bench.report -->\n", "<!-- end -->"
HF = (
    "A training step of transformers' own models before and after `fastlm.hf.enable`, one model in one process; "
    "peak memory of a process with weights, gradients and optimizer:"
)


def render() -> str:
    lines: list[str] = []
    for path in sorted((ROOT / "bench" / "results").glob("cpu-*.json")):  # of python -m bench cpu
        lines += [*cpu(json.loads(path.read_text())), ""]
        drawing = path.with_suffix(".svg")
        if drawing.exists():
            lines += [f"![Speed over PyTorch]({drawing.relative_to(ROOT)})", ""]
    for path in sorted((ROOT / "bench" / "results").glob("hf-*.json")):  # of python -m bench.bench_hf
        lines += [HF, "", *hf(json.loads(path.read_text())), ""]
    for path in sorted((ROOT / "bench" / "results").glob("*/results.json")):  # of python -m bench.gpu
        lines += [*markdown(json.loads(path.read_text())), ""]
        drawing = path.with_name("attention.svg")
        if drawing.exists():
            lines += [f"![Attention's speed]({drawing.relative_to(ROOT)})", ""]
    return "\n".join(lines)


def update(text: str) -> str:
    """README with the table between its marks replaced."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise SystemExit(f"{README.name} lacks the lines {BEGIN.strip()} and {END}")
    return f"{head}{BEGIN}{render()}{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when README is not up to date")
    options = parser.parse_args()
    if not options.check:
        for path in sorted((ROOT / "bench" / "results").glob("cpu-*.json")):
            plot(json.loads(path.read_text()), path.with_suffix(".svg"))
    text = README.read_text()
    updated = update(text)
    if options.check:
        raise SystemExit(int(text != updated))
    README.write_text(updated)


if __name__ == "__main__":
    main()
