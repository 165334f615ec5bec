"""What was measured on a CPU, as README's table and as a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.cpu import results
from bench.cpu.items import Item, items
from bench.cpu.results import COMPILED, find


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def promises(item: Item, row: Mapping[str, Any]) -> str:
    """Each target and whether it holds; its ratio too where no column of the table has it."""
    cells = []
    for target in item.targets:
        measured, good = results.holds(row, target)
        own = target.peer in COMPILED or target.peer in results.eager(row)
        name = "compile" if target.peer in COMPILED else "PyTorch" if own else target.peer
        where = ", default malloc" if item.kind == "step" and target.malloc == "default" else ""
        said = "not measured" if measured is None else "✓" if good else "✗"
        cells.append(
            f"{name}{where}{'' if own or measured is None else f' {times(measured)}'} ≥ {target.least:g} {said}"
        )
    return "; ".join(cells)


def measured_items(data: Mapping[str, Any]) -> Iterator[tuple[Item, dict[str, Any]]]:
    for item in items():
        row = find(data, item.key)
        if row is not None and results.ours(row) is not None:
            yield item, row


def markdown(data: Mapping[str, Any]) -> Iterator[str]:
    """README's section for one machine."""
    runs = [run for row in data["rows"] for run in row["runs"].values()]
    commits = sorted({run["commit"] for run in runs})
    versions = sorted({f"torch {run['torch']}, Python {run['python']}" for run in runs})
    ceilings = data["ceilings"].get("tuned") or next(iter(data["ceilings"].values()))
    products = ", ".join(f"{r / 1e9:.0f} GFLOP/s {d}" for d, r in ceilings["product"].items())
    yield (
        f"{data['device']}, {data['threads']} threads, {data['isa']}; {'; '.join(versions)}; commit "
        f"{', '.join(commits)}. Ceilings: {ceilings['bandwidth'] / 1e9:.0f} GB/s, matrix product {products}."
    )
    yield ""
    yield (
        "| op | shape | dtype | fastlm | × PyTorch | × torch.compile | × PyTorch, default malloc "
        "| promised, tuned malloc | of ceiling |"
    )
    yield "|---|---|---|--:|--:|--:|--:|---|--:|"
    slower = []
    for item, row in measured_items(data):
        plain = results.eager(row)
        cells = [times(results.ratio(row, plain, "tuned")), times(results.ratio(row, COMPILED, "tuned"))]
        if item.kind == "memory":  # measured with malloc as it comes alone: tuned, freed memory stays resident
            cells = [times(results.ratio(row, plain, "default")), times(results.ratio(row, COMPILED, "default"))]
        default = times(results.ratio(row, plain, "default")) if item.kind != "memory" else ""
        found = results.share(data, row)
        share = f"{found[0]:.0%} {found[1]}" if found else ""
        took = results.amount(row, results.ours(row) or 0.0)
        best = results.ratio(row, (*plain, *COMPILED), "tuned")
        if best is not None and best < 0.995:
            slower.append(f"{item.name} {best:.2f}×")
        if item.targets:
            yield (
                f"| {' | '.join(item.key)} | {took} | {cells[0]} | {cells[1]} | {default} | {promises(item, row)} "
                f"| {share} |"
            )
    yield ""
    yield (
        "Ratios of medians, malloc tuned on both sides unless said. A training step of fastlm has malloc tuned always. "
        f"All rows, small shapes among them, in which a peer is faster: {', '.join(slower) or 'none'}."
    )


def plot(data: Mapping[str, Any], path: Path) -> bool:
    """Ratios beside what is promised, and shares of the ceilings, as SVG; False and nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    rows = [(item, row) for item, row in measured_items(data) if item.targets]
    names = [item.name for item, _ in rows]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlm", "font.size": 8}):
        figure = Figure(figsize=(10, 1 + 0.24 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for index, (item, row) in enumerate(rows):
            malloc = "default" if item.kind == "memory" else "tuned"
            for offset, peers, color in ((-0.2, results.eager(row), "#7aa6d8"), (0.2, COMPILED, "#b3202c")):
                value = results.ratio(row, peers, malloc)
                if value is not None:
                    left.barh(index + offset, value, 0.36, color=color)
                for target in item.targets:
                    if target.peer in peers and target.malloc == malloc:
                        left.plot([target.least] * 2, [index + offset - 0.2, index + offset + 0.2], color="black")
            share = results.share(data, row)
            if share:
                right.barh(index, 100 * share[0], 0.7, color="#888888")
        left.axvline(1, color="black", linewidth=0.6)
        left.set(xscale="log", yticks=range(len(rows)), yticklabels=names)
        left.set_xlabel("times fastlm's: PyTorch (blue), torch.compile (red); black: promised")
        right.set_xlabel("% of the measured ceiling")
        left.invert_yaxis()
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True
