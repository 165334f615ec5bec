"""Token ids in a file that is mapped into memory, never read as a whole.

Layout, little-endian: a header of 64 bytes, then `count` ids of `itemsize` bytes each.

    offset  type      field
    0       char[8]   magic, "FASTLMTK"
    8       uint32    version, 1
    12      uint32    itemsize: 2 (uint16) while vocab_size <= 65536, else 4 (uint32)
    16      uint64    count
    24      uint32    vocab_size; every id is below it
    28      uint32    CRC-32 of the ids
    32      char[16]  fingerprint of the tokenizer
    48      char[12]  zeros
    60      uint32    CRC-32 of bytes 0 to 59
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlm.data.files import atomic_file

MAGIC = b"FASTLMTK"
VERSION = 1
HEADER = struct.Struct("<8sIIQII16s12x")
HEADER_BYTES = HEADER.size + 4
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Attributes:
        path: the file.
        tokens: (N,) uint16 or uint32, mapped read-only.
        vocab_size: every id is below it.
        tokenizer: fingerprint of the tokenizer, 32 hex digits.
    """

    path: Path
    tokens: np.ndarray
    vocab_size: int
    tokenizer: str

    def __len__(self) -> int:
        return len(self.tokens)


def _crc(array: np.ndarray) -> int:
    data, crc = np.ascontiguousarray(array).view(np.uint8).data, 0
    for start in range(0, len(data), _CHUNK):
        crc = zlib.crc32(data[start : start + _CHUNK], crc)
    return crc


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int, tokenizer: str) -> Path:
    """Write ids to a file, which appears complete or not at all.

    Args:
        tokens: (N,) integers in [0, vocab_size).
        tokenizer: Tokenizer.fingerprint.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be one row of integers, got shape {tokens.shape}, dtype {tokens.dtype}")
    if not 1 <= vocab_size <= 2**32 - 1:
        raise ValueError(f"vocab_size must be in 1 .. 2^32 - 1, got {vocab_size}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise ValueError(f"tokens must be in 0 .. {vocab_size - 1}, got {int(tokens.min())} .. {int(tokens.max())}")
    dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
    payload = tokens.astype(dtype)
    header = HEADER.pack(
        MAGIC, VERSION, dtype.itemsize, payload.size, vocab_size, _crc(payload), bytes.fromhex(tokenizer)
    )
    with atomic_file(path) as file:
        file.write(header + struct.pack("<I", zlib.crc32(header)))
        file.write(payload.data)
    return path


def open_shard(
    path: str | Path, vocab_size: int | None = None, tokenizer: str | None = None, verify: bool = True
) -> Shard:
    """Map a shard into memory after checking it.

    Args:
        vocab_size, tokenizer: what the shard must have been written with; None takes any.
        verify: also compare the checksum of the ids, about a second per gigabyte.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, not a shard, or of another vocabulary or tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"token shard {path} does not exist; fastlm train FILE_OR_FOLDER builds it")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if head[:8] != MAGIC[: len(head)] or not head:
        raise ValueError(f"{path} is not a token shard: it starts with {head[:8]!r}, a shard with {MAGIC!r}")
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{path} is truncated: {size} bytes, a shard has at least {HEADER_BYTES}")
    _, version, itemsize, count, vocab, crc, mark = HEADER.unpack(head[: HEADER.size])
    if version != VERSION:
        raise ValueError(f"{path} has version {version}; this fastlm reads version {VERSION}")
    if zlib.crc32(head[: HEADER.size]) != struct.unpack("<I", head[HEADER.size :])[0] or itemsize not in (2, 4):
        raise ValueError(f"{path} is damaged: the checksum of its header does not fit")
    expected = HEADER_BYTES + count * itemsize
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise ValueError(f"{path} is {what}: {size} bytes, its header promises {expected} ({count} tokens)")
    if vocab_size is not None and vocab != vocab_size:
        raise ValueError(f"{path} was written for a vocabulary of {vocab}, not {vocab_size}")
    if tokenizer is not None and mark.hex() != tokenizer:
        raise ValueError(f"{path} was written with tokenizer {mark.hex()}, not {tokenizer}")
    dtype = np.dtype("<u2" if itemsize == 2 else "<u4")
    tokens: np.ndarray
    if count:
        tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    else:
        tokens = np.empty(0, dtype=dtype)  # an empty map is refused by the system
    if verify and _crc(tokens) != crc:
        raise ValueError(f"{path} is damaged: the checksum of its {count} tokens does not fit")
    return Shard(path, tokens, vocab, mark.hex())
