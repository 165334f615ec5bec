"""Every op forward and backward on sizes that fill no block; python -m bench.gpu.odd, under compute-sanitizer.

Nothing is compared here, the tests do that: the tool watches what memory the kernels touch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastlm
from bench.gpu.items import attention_items, op_items
from bench.harness import Run, forward_backward
from fastlm import ops
from fastlm._dispatch import NAMES


def attention_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments of attention that change what its kernels read, for B=2, 4 query and 2 key heads, S=67, T=131."""
    yield "plain", {}
    yield "causal", {"causal": True}
    yield "window", {"window": (16, 0)}
    yield "softcap", {"softcap": 20.0}
    yield "alibi", {"alibi_slopes": torch.rand(4), "causal": True}
    yield "sinks", {"sinks": torch.randn(4)}
    yield "boolean mask", {"mask": torch.rand(2, 1, 67, 131) > 0.3}
    yield "bias", {"mask": torch.randn(1, 4, 67, 131)}
    yield "documents", {"documents": (torch.arange(67).expand(2, 67) // 20, torch.arange(131).expand(2, 131) // 20)}
    yield "dropout", {"dropout": 0.2}


def runs() -> Iterator[tuple[str, Callable[[], Run]]]:
    for item in (*op_items(small=True), *attention_items(small=True)):
        yield item.name, lambda item=item: item.case.build("fastlm")["fastlm"]
    for dtype in (torch.bfloat16, torch.float32):
        for d in (64, 40):
            for name, options in attention_options():

                def make(dtype: torch.dtype = dtype, d: int = d, options: dict[str, Any] = options) -> Run:
                    q = torch.randn(2, 4, 67, d).to(dtype).requires_grad_()
                    k, v = (torch.randn(2, 2, 131, d).to(dtype).requires_grad_() for _ in range(2))
                    return forward_backward(lambda q, k, v: ops.attention(q, k, v, **options), [q, k, v])

                yield f"attention {name} D{d} {dtype}", make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.odd", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=NAMES, help="default: what is chosen")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    failures = 0
    for name, make in runs():
        print(name, flush=True)
        try:
            with fastlm.use_backend(options.backend):
                make()()
        except fastlm.UnsupportedError as reason:
            print(f"  not supported: {reason}", flush=True)
        except Exception as error:  # the rest is still to be watched
            failures += 1
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
        if options.device == "cuda":
            torch.cuda.synchronize()
    raise SystemExit(int(failures > 0))


if __name__ == "__main__":
    main()
