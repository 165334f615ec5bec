"""Scratch of the kernels, kept between calls.

A block above 32 MiB comes from the kernel each time and costs a page fault per 4 KiB when it is first touched, smaller
ones whenever glibc has trimmed its heap: more than many an op. So what an op needs for itself alone is lent and taken
back. Outputs never come from here: they belong to whoever called.

Each Python thread keeps its own blocks, so that nothing is locked and nothing can be lent twice. A nested call gets
other blocks. A forked child keeps the copies it got. What is held is at most a tenth of the most memory the process
ever had, so that what is resident grows by less than a fifth; blocks not used for the longest time go first.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 18
"""Bytes below which the heap keeps blocks by itself."""
SHARE = 10

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


def peak() -> int:
    """Bytes of physical memory that the process had at most."""
    with suppress(OSError, IndexError):  # Linux; getrusage() there counts what the parent had before exec
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def bucket(size: int) -> int:
    """The next of four sizes an octave: a block is at most a quarter larger than what it is lent for."""
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


class Pool:
    """The blocks of one thread that nobody uses, by size; the least lately used size first."""

    def __init__(self) -> None:
        self.free: dict[int, list[Tensor]] = {}
        self.most = self.sharers = 0
        """What may be held, as last looked up (the peak only rises), for so many threads."""

    @property
    def held(self) -> int:
        return sum(size * len(blocks) for size, blocks in list(self.free.items()))

    def take(self, size: int, allocate: Allocate) -> Tensor:
        blocks = self.free.get(size)
        if blocks:
            with suppress(IndexError):  # release() of another thread was faster
                return blocks.pop()
        with torch.inference_mode(False):  # or no one outside of it could write to the block later
            return allocate((size,), torch.uint8)

    def give_back(self, block: Tensor) -> None:
        if type(block) is not Tensor:  # a tensor mode made it
            return
        blocks = self.free.pop(block.nbytes, [])
        blocks.append(block)
        self.free[block.nbytes] = blocks
        if self.held > self.most or self.sharers != len(POOLS):
            self.sharers = len(POOLS)
            self.most = peak() // (SHARE * max(self.sharers, 1))
            self.trim(self.most)

    def trim(self, most: int) -> None:
        for size, blocks in list(self.free.items()):
            while blocks and self.held > most:
                with suppress(IndexError):
                    blocks.pop()
            if not blocks:
                self.free.pop(size, None)


class _Local(threading.local):
    def __init__(self) -> None:
        self.pool = Pool()
        POOLS.add(self.pool)


POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()
_local = _Local()


def held() -> int:
    """Bytes that all threads hold for their next calls."""
    return sum(pool.held for pool in list(POOLS))


def release() -> None:
    for pool in list(POOLS):
        pool.trim(0)


class Loan:
    """Scratch for the length of a `with`: a flat tensor of so many elements, with anything in it."""

    __slots__ = ("allocate", "block", "count", "dtype")

    def __init__(self, count: int, dtype: torch.dtype, allocate: Allocate) -> None:
        self.count, self.dtype, self.allocate = count, dtype, allocate

    def __enter__(self) -> Tensor:
        size = self.count * self.dtype.itemsize
        if size < SMALLEST:
            self.block = None
            return self.allocate((self.count,), self.dtype)
        self.block = _local.pool.take(bucket(size), self.allocate)
        return self.block[:size].view(self.dtype)

    def __exit__(self, *_: object) -> None:
        if self.block is not None:
            _local.pool.give_back(self.block)
            self.block = None
