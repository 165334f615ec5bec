"""README's tables, made of bench/results/*.json (python -m bench --save) and bench/results/*/results.json, which
python -m bench.gpu wrote: `python -m bench.report` rewrites them, `--check` only compares.

Ratios are the peer's median time over ours, taken in turn in one process, on a CPU both under the same malloc setting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: python -m bench.report -->\n", "<!-- end -->"


def ratio(row: dict | None, peers: tuple[str, ...]) -> str:
    """Best of the named peers over ours, or nothing when none was run."""
    seconds = {p: row["seconds"][p] for p in peers if p in row["seconds"]} if row else {}
    return f"{min(seconds.values()) / row['seconds']['fastlm']:.1f}×" if row and seconds else ""


def table(document: dict) -> Iterator[str]:
    """Lines of markdown for one device."""
    rows = {(r["op"], r["shape"], r["dtype"], r["malloc"]): r for r in document["rows"]}
    commits = sorted({r["commit"] for r in document["rows"]})
    versions = sorted({f"torch {r['torch']}, Python {r['python']}" for r in document["rows"]})
    ceilings = document["ceilings"].get("tuned") or next(iter(document["ceilings"].values()))
    products = ", ".join(f"{r / 1e9:.0f} GFLOP/s {d}" for d, r in ceilings["product"].items())
    yield (
        f"{document['device']}, {document['threads']} threads, {document['isa']}; {'; '.join(versions)}; "
        f"commit {', '.join(commits)}. Ceilings: copy {ceilings['copy'] / 1e9:.0f} GB/s, matrix product {products}."
    )
    yield ""
    yield "| op | shape | dtype | ms | × PyTorch | × torch.compile | × PyTorch, default malloc | of ceiling |"
    yield "|---|---|---|--:|--:|--:|--:|--:|"
    best = {key: rows.get((*key, "tuned")) or rows[(*key, "default")] for key in {key[:3] for key in rows}}
    for op, dtype in sorted({(op, dtype) for op, _, dtype in best}):
        _, shape = max((row["seconds"]["fastlm"], key[1]) for key, row in best.items() if key[::2] == (op, dtype))
        tuned, default = rows.get((op, shape, dtype, "tuned")), rows.get((op, shape, dtype, "default"))
        row = best[op, shape, dtype]
        peers = tuple(p for p in row["seconds"] if p not in ("fastlm", "compile"))
        yield (
            f"| {op} | {shape} | {dtype} | {row['seconds']['fastlm'] * 1e3:.2f} | {ratio(tuned, peers)} "
            f"| {ratio(tuned, ('compile',))} | {ratio(default, peers)} | {row['share']:.0%} |"
        )
    slower = [f"{' '.join(key)} {row['ratio']:.2f}×" for key, row in sorted(best.items()) if row["ratio"] < 0.995]
    yield ""
    yield f"Largest shape of each op. All rows in which a peer is faster: {', '.join(slower) or 'none'}."


def render() -> str:
    lines: list[str] = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        document = json.loads(path.read_text())
        if "rows" in document:
            lines += [*table(document), ""]
    for path in sorted((ROOT / "bench" / "results").glob("*/results.json")):  # of python -m bench.gpu
        lines += [*markdown(json.loads(path.read_text())), ""]
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
    text = README.read_text()
    updated = update(text)
    if options.check:
        raise SystemExit(int(text != updated))
    README.write_text(updated)


if __name__ == "__main__":
    main()
