"""Stream one safetensors file to storage; the bytes are hashed on the way.

Called by the checkpointer for each planned file. The header is known beforehand (`format.safetensors_header`); the
checksums are handed to `writer`, which puts them into the index and the manifest.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from titan_ckpt.format.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.storage.base import SinkFile, Storage
from titan_ckpt.threads import Helper, Result

_AHEAD = 1  # buffers that may be written but not yet hashed
_SMALL = 64 << 10  # bytes: smaller buffers are joined, because the overhead per buffer exceeds the cost of its bytes
_JOINED = 1 << 20  # bytes: joined buffers are written when they reach this
_BETWEEN_CHECKS = 256 << 20  # bytes that are written before a time limit is looked at again


@dataclass(frozen=True)
class WrittenFile:
    """Size and checksums of a file that was written.

    Attributes:
        size: Length in bytes.
        checksum: Checksum of the full content.
        pieces: The checksums of each chunk's pieces, by chunk.
    """

    size: int
    checksum: str
    pieces: list[tuple[str, ...]]


def write_file(
    storage: Storage,
    path: str,
    header: bytes,
    runs: Iterable[tuple[Any, Sequence[int]]],
    check: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write a file, one buffer after the other, and make it durable.

    Args:
        storage: The directory of checkpoints.
        path: The file, which must not exist yet.
        header: Its first bytes.
        runs: The remaining content: byte buffers, each with the lengths of the chunks stored one after the other in it.
            The next buffer is requested when the one before is written, and at most two are held at a time.
        check: Called between writes; what it raises ends the writing.

    Returns:
        Size and checksums of the bytes that were handed to the storage.
    """
    sink = storage.create(path)
    try:
        # One thread hashes while this one writes. Each works on full buffers: every return to Python may wait for the
        # GIL while training holds it, so there should be few.
        hashing = Helper("titan-ckpt-hash")
        try:
            written = _Stream(sink, hashing, check).write(header, runs)
        finally:
            hashing.close()
    except BaseException:
        sink.discard()
        raise
    sink.close()
    return written


class _Stream:
    """Writes buffers to a sink, and hashes them in the same order in another thread."""

    def __init__(self, sink: SinkFile, hashing: Helper, check: Callable[[], None]) -> None:
        self._sink, self._hashing, self._check = sink, hashing, check
        self._running = running_checksum()
        self._pending: deque[Result[list[tuple[str, ...]]]] = deque()
        self._found: list[tuple[str, ...]] = []
        self._joined = bytearray()
        self._lengths: list[int] = []
        self._size = 0

    def write(self, header: bytes, runs: Iterable[tuple[Any, Sequence[int]]]) -> WrittenFile:
        """Write everything."""
        self._write_buffer(memoryview(header), ())
        for buffer, lengths in runs:
            view = memoryview(buffer)
            if len(view) < _SMALL:
                self._joined += view
                self._lengths += lengths
                if len(self._joined) >= _JOINED:
                    self._flush()
            else:
                self._flush()
                self._write_buffer(view, lengths)
        self._flush()
        self._collect_hashes(0)
        return WrittenFile(self._size, self._running.hexdigest(), self._found)

    def _flush(self) -> None:
        if self._lengths:
            joined, lengths = self._joined, self._lengths
            self._joined, self._lengths = bytearray(), []
            self._write_buffer(memoryview(joined), lengths)

    def _write_buffer(self, view: memoryview, lengths: Sequence[int]) -> None:
        self._pending.append(self._hashing.submit(self._hash, view, lengths))
        self._size += len(view)
        for start in range(0, len(view), _BETWEEN_CHECKS):
            self._check()
            self._sink.write(view[start : start + _BETWEEN_CHECKS])
        self._collect_hashes(_AHEAD)

    def _collect_hashes(self, most_pending: int) -> None:
        while len(self._pending) > most_pending:
            self._found += self._pending.popleft().get()

    def _hash(self, view: memoryview, lengths: Sequence[int]) -> list[tuple[str, ...]]:
        """Hash a buffer into the file's checksum, and each piece of its chunks separately."""
        self._running.update(view)
        found, at = [], 0
        for length in lengths:
            ends = pieces(length, PIECE_BYTES)
            found.append(tuple(checksum(view[at + start : at + stop]) for start, stop in ends))
            at += length
        return found
