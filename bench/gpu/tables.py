"""What was measured, as text and as plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import OWN


def rate(row: dict[str, Any], seconds: float) -> str:
    """TFLOP/s where products are the work, else GB/s."""
    if row["flops"]:
        return f"{row['flops'] / seconds / 1e12:.0f} TFLOP/s"
    return f"{row['bytes'] / seconds / 1e9:.0f} GB/s"


def cells(row: dict[str, Any]) -> list[str]:
    """ms, rate, share of the measured ceiling, ratio to the best peer and its name, host microseconds."""
    mine = row["seconds"].get("fastlm")
    if not mine:
        return ["failed", "", "", "", "", ""]
    share, host = row.get("share"), row["host"].get("fastlm")
    return [
        f"{1e3 * mine:.3f}",
        rate(row, mine),
        "" if share is None else f"{share:.0%}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        row["best_peer"],
        "" if host is None else f"{1e6 * host:.0f}",
    ]


def backends(row: dict[str, Any]) -> dict[str, float]:
    """Seconds by backend of ours, where there is more than one."""
    found = {name: row["seconds"][name] for name in OWN[1:] if name in row["seconds"]}
    if row.get("backend") and "fastlm" in row["seconds"]:
        found[row["backend"]] = row["seconds"]["fastlm"]
    return found if len(found) > 1 else {}


def versus(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """op, shape, dtype, milliseconds of each backend, the fastest and by how much: what the order of rows goes by."""
    for row in data["rows"]:
        if found := backends(row):
            first, second, *_ = sorted(found, key=found.__getitem__)
            times = ", ".join(f"{name} {1e3 * found[name]:.3f}" for name in sorted(found))
            yield row["op"], row["shape"], row["dtype"], times, first, f"{found[second] / found[first]:.2f}x"


def wins(data: dict[str, Any]) -> Iterator[str]:
    """For each op how many sizes each backend is fastest at."""
    counts: dict[str, Counter[str]] = {}
    for op, _, _, _, first, _ in versus(data):
        counts.setdefault(op, Counter())[first] += 1
    for op, by in counts.items():
        yield f"{op}: " + ", ".join(f"{name} fastest at {count} of {by.total()}" for name, count in by.most_common())


RIVALS = {"× cuDNN": "sdpa cudnn", "× flash": "sdpa flash"}
"""Over whom attention's speed is told, by the heading."""


def attention_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that were measured; by direction, mask, head dim and length of the sequence."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return "causal" in row["op"], ["forward", "backward", "both"].index(row["op"].split()[1]), *sizes(row)

    return sorted((r for r in data["rows"] if r["stage"] == "attention" and r["seconds"].get("fastlm")), key=key)


def sizes(row: dict[str, Any]) -> tuple[int, int]:
    """Head dim and length of the sequence."""
    return int(row["shape"].split()[3][1:]), int(row["shape"].split()[2][1:])


def sweep(data: dict[str, Any]) -> Iterator[list[str]]:
    """Attention's table, its heads first: TFLOP/s of everyone, ours as a share of the measured product, ratios."""
    rows = attention_rows(data)
    providers = sorted({p for r in rows for p in r["seconds"]}, key=lambda p: (p not in OWN, p))
    yield ["attention", "D", "S", *providers, "of product", *RIVALS]
    product = data["ceilings"].get("product", {})
    for row in rows:
        speeds = {p: row["flops"] / seconds / 1e12 for p, seconds in row["seconds"].items()}
        ratios = [speeds["fastlm"] / speeds[p] if p in speeds else None for p in RIVALS.values()]
        share = speeds["fastlm"] * 1e12 / product[row["dtype"]] if row["dtype"] in product else None
        yield [
            row["op"].removeprefix("attention "),
            *map(str, sizes(row)),
            *(f"{speeds[p]:.0f}" if p in speeds else "" for p in providers),
            "" if share is None else f"{share:.0%}",
            *("" if ratio is None else f"{ratio:.2f}×" for ratio in ratios),
        ]


def behind(data: dict[str, Any]) -> Iterator[str]:
    """Of the sweep, how often each rival is behind us, and where it is not."""
    for rival in RIVALS.values():
        rows = [r for r in attention_rows(data) if rival in r["seconds"]]
        lost = [f"{r['op']} {r['shape']}" for r in rows if r["seconds"]["fastlm"] > r["seconds"][rival]]
        if rows:
            rest = f"; not at {', '.join(lost)}" if lost else ""
            yield f"attention: ahead of {rival} at {len(rows) - len(lost)} of {len(rows)} sizes{rest}"


HEADS = ["ms", "rate", "of ceiling", "ratio", "best peer", "host us"]


def summary(data: dict[str, Any]) -> Iterator[str]:
    """The lines printed last."""
    about = data["about"]
    yield ""
    yield ", ".join(f"{name} {about.get(name)}" for name in ("device", "torch", "triton", "commit"))
    if data["ceilings"]:
        products = ", ".join(f"{d} {r / 1e12:.3g}" for d, r in data["ceilings"]["product"].items())
        yield f"ceilings: copy {data['ceilings']['copy'] / 1e9:.0f} GB/s; products in TFLOP/s: {products}"
    if "tests" in data:
        tests = data["tests"]
        yield f"tests: {tests['outcomes']}{'' if tests['complete'] else ', incomplete'}"
        yield from (f"  FAILED {failure['test']}" for failure in tests["failures"][:20])
    if "sanitize" in data:
        found = data["sanitize"]
        yield "sanitize: " + (found.get("missing") or ", ".join(f"{k}: {v['errors']} errors" for k, v in found.items()))
        for name, tool in found.items() if "missing" not in found else ():
            yield from (f"  {name}: {text}" for text in tool.get("explained", []))
    if data["rows"]:
        yield f"{'':44} {'ms':>9} {'rate':>13} {'of ceiling':>10} {'ratio':>7} {'best peer':>14} {'host us':>8}"
    for row in data["rows"]:
        ms, speed, share, ratio, peer, host = cells(row)
        ungraphed = "" if all(row["graph"].values()) else "  no graph: " + ", ".join(
            name for name, captured in row["graph"].items() if not captured
        )  # fmt: skip
        yield f"{row['name'][:44]:44} {ms:>9} {speed:>13} {share:>10} {ratio:>7} {peer:>14} {host:>8}{ungraphed}"
    for op, shape, dtype, times, first, by in versus(data):
        yield f"backends: {f'{op} {shape} {dtype}'[:44]:44} ms: {times}; {first} by {by}"
    yield from (f"backends: {text}" for text in wins(data))
    yield from behind(data)
    for best in data.get("tune", []):
        yield f"tune: {best['name']}: {best['best']} {best['gain']:.2f}x the default's speed"
    for note in data["failed"]:
        yield f"FAILED {note['stage']}: {note['name']}: {note['why'].splitlines()[0][:160]}"
    names: dict[str, list[str]] = {}
    for note in data["dropped"]:
        names.setdefault(f"{note['stage']}, {note['why']}", []).append(note["name"])
    for why, dropped in names.items():
        yield f"dropped ({why}): {'; '.join(dropped)}"


def markdown(data: dict[str, Any]) -> Iterator[str]:
    """README's section for one device."""
    about, ceilings = data["about"], data["ceilings"]
    products = ", ".join(f"{r / 1e12:.0f} TFLOP/s {d}" for d, r in ceilings["product"].items() if d != "float16")
    yield (
        f"{about['device']}; torch {about['torch']}, Triton {about['triton']}; commit {about['commit']}. Ceilings: "
        f"copy {ceilings['copy'] / 1e9:.0f} GB/s, matrix product {products}. Times of CUDA graphs where they can be "
        f"captured."
    )
    yield ""
    yield "| op | shape | dtype | ms | rate | of ceiling | × best peer | peer |"
    yield "|---|---|---|--:|--:|--:|--:|---|"
    for row in data["rows"]:
        if row["stage"] == "attention":
            continue
        ms, speed, share, ratio, peer, _ = cells(row)
        ratio = ratio.replace("x", "×")
        yield f"| {row['op']} | {row['shape']} | {row['dtype']} | {ms} | {speed} | {share} | {ratio} | {peer} |"
    measured = list(versus(data))
    if measured:
        yield ""
        yield "| op | shape | dtype | ms of our backends | fastest | by |"
        yield "|---|---|---|---|---|--:|"
        for op, shape, dtype, times, first, by in measured:
            yield f"| {op} | {shape} | {dtype} | {times} | {first} | {by.replace('x', '×')} |"
    heads, *lines = sweep(data)
    if lines:
        yield ""
        yield "Attention in TFLOP/s, bfloat16, 16 Ki tokens of 2048 channels; causal counts half the operations:"
        yield ""
        yield f"| {' | '.join(heads)} |"
        yield "|---" + "|--:" * (len(heads) - 1) + "|"
        yield from (f"| {' | '.join(cells)} |" for cells in lines)


def plot(data: dict[str, Any], folder: Path) -> list[Path]:
    """ops.svg and attention.svg; nothing without matplotlib or without rows."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    from matplotlib import pyplot

    written = []
    rows = [r for r in data["rows"] if r["stage"] == "ops" and r["seconds"].get("fastlm")]
    if rows:
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 1 + 0.22 * len(rows)), sharey=True)
        names = [r["name"] for r in rows]
        axes[0].barh(names, [100 * r.get("share", 0) for r in rows])
        axes[0].set_xlabel("% of the measured ceiling")
        axes[1].barh(names, [r["ratio"] or 0 for r in rows])
        axes[1].axvline(1, color="black", linewidth=0.8)
        axes[1].set_xlabel("speed over the best peer")
        axes[0].invert_yaxis()
        written.append(_save(figure, folder / "ops.svg"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in attention_rows(data):
        groups.setdefault(f"{r['op']} {r['shape'].split()[-1]}", []).append(r)
    if groups:
        figure, grid = pyplot.subplots(-(-len(groups) // 3), 3, figsize=(14, 3 * -(-len(groups) // 3)), squeeze=False)
        for axis in grid.flat[len(groups) :]:
            axis.set_axis_off()
        for axis, (name, members) in zip(grid.flat, groups.items(), strict=False):
            for provider in sorted({p for r in members for p in r["seconds"]}):
                points = [
                    (sizes(r)[1], r["flops"] / r["seconds"][provider] / 1e12)
                    for r in members
                    if provider in r["seconds"]
                ]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=provider)
            product = data["ceilings"].get("product", {}).get(members[0]["dtype"])
            if product:
                axis.axhline(product / 1e12, color="black", linewidth=0.8, linestyle="--", label="matrix product")
            axis.set(title=name, xlabel="sequence", ylabel="TFLOP/s", ylim=(0, None))
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=6)
        written.append(_save(figure, folder / "attention.svg"))
    return written


def _save(figure: Any, path: Path) -> Path:
    import matplotlib
    from matplotlib import pyplot

    figure.tight_layout()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlm"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return path
