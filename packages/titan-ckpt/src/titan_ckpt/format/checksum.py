"""The checksum: XXH3 of 128 bits, fast enough (tens of GiB/s) to be taken of everything that is written and read."""

from collections.abc import Iterator
from typing import Any

import xxhash

ALGORITHM = "xxh3_128"
# Tensors are checked in pieces, so that a part of a chunk can be checked without the whole. 8 MiB stay in a CPU's cache
# between being read, hashed and copied, and are large enough for an object store.
PIECE_BYTES = 8 << 20


def checksum(content: Any) -> str:
    """Return the checksum of a buffer in hexadecimal; large ones are hashed without the interpreter's lock."""
    return xxhash.xxh3_128_hexdigest(content)


def running_checksum() -> "xxhash.xxh3_128":
    """Return an object whose `update` takes buffers and whose `hexdigest` is the checksum of them all."""
    return xxhash.xxh3_128()


def pieces(nbytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut a number of bytes into pieces.

    Args:
        nbytes: how many bytes there are.
        piece_bytes: how many belong to a piece; the last one gets what is left.

    Yields:
        Where each piece starts and where it stops.
    """
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)
