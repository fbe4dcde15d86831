"""The checksum: 128-bit XXH3, fast enough (tens of GiB/s) for everything that is written and read."""

from collections.abc import Iterator
from typing import Any

import xxhash

ALGORITHM = "xxh3_128"
# A chunk is checksummed in pieces, so that a part of it can be verified without reading all of it. 8 MiB stay in a
# CPU's cache between being read, hashed and copied, and are large enough for a request to an object store.
PIECE_BYTES = 8 << 20


def checksum(content: Any) -> str:
    """Return the checksum of a buffer in hexadecimal. The GIL is released while large buffers are hashed."""
    return xxhash.xxh3_128_hexdigest(content)


def running_checksum() -> "xxhash.xxh3_128":
    """Return an incremental hasher with `update(buffer)` and `hexdigest()`."""
    return xxhash.xxh3_128()


def pieces(nbytes: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut a number of bytes into pieces.

    Args:
        nbytes: The number of bytes.
        piece_bytes: The size of a piece; the last one may be shorter.

    Yields:
        Start and stop of each piece.
    """
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)
