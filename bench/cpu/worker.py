"""Times ops under one malloc setting, in a process of its own because the setting cannot be taken back.

python -m bench.cpu.worker tuned NAME ...     a JSON line for the ceilings, one for each item of these names,
                                                  and the ceilings again: the best of both times
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from typing import Any

import torch

import fastlm
from bench.cpu.items import Item, items
from bench.harness import Ceilings, Clock, dtype_name, measure, measure_ceilings


def bandwidth(copy: float, floats: int = 1 << 26) -> float:
    """Bytes a second at best: of the copy, or of a pass in place, whose stores read nothing but what is changed."""
    x, clock = torch.zeros(floats), Clock()
    run = clock.prepare(lambda: x.add_(1))
    return max(copy, 2 * x.nbytes / min(clock.span(run)() for _ in range(7)))


def time_item(item: Item) -> dict[str, Any]:
    assert item.case is not None
    if item.targets:
        result = measure(item.case, seconds=3.0, least=3)
    else:
        result = measure(item.case, seconds=0.5, least=9)
    return {"values": result.medians, "bytes": item.case.bytes, "flops": item.case.flops}


def best(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of each: a busy neighbour on the machine is no ceiling."""
    products = {dtype: max(rate, second.products[dtype]) for dtype, rate in first.products.items()}
    return Ceilings(max(first.copy, second.copy), products)


def look() -> Ceilings:
    found = measure_ceilings()
    return replace(found, copy=bandwidth(found.copy))


def tell(ceilings: Ceilings) -> None:
    products = {dtype_name(dtype): rate for dtype, rate in ceilings.products.items()}
    print(json.dumps({"bandwidth": ceilings.copy, "product": products}), flush=True)


def main() -> None:
    malloc, *names = sys.argv[1:]
    if malloc == "tuned" and not fastlm.tune_malloc():
        raise SystemExit("malloc cannot be tuned here: python -m fastlm.info says why")
    ceilings = look()
    tell(ceilings)
    wanted = {item.name: item for item in items()}
    for name in names:
        try:
            answer = time_item(wanted[name])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps({"name": name, **answer}), flush=True)
    tell(best(ceilings, look()))


if __name__ == "__main__":
    main()
