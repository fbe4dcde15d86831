"""One safetensors file, streamed: the header is known beforehand, and what passes by is hashed on its way.

Nothing here imports torch: a process that only writes has no use for it.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from titan_ckpt.format.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.storage.base import SinkFile, Storage

_AHEAD = 1  # buffers written but not yet hashed
_SMALL = 64 << 10  # bytes: buffers below this are gathered, for handing on each by itself costs more than the bytes do
_GATHERED = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """What came of writing a file.

    Attributes:
        size: its length in bytes.
        checksum: of all of it.
        pieces: the checksums of each chunk's pieces, by chunk.
    """

    size: int
    checksum: str
    pieces: list[tuple[str, ...]]


def write_file(storage: Storage, path: str, header: bytes, runs: Iterable[tuple[Any, Sequence[int]]]) -> WrittenFile:
    """Write a file, one buffer after the other, and sync it to the disk.

    Args:
        storage: where.
        path: the file, which must not be there yet.
        header: its first bytes.
        runs: the rest: buffers of bytes, each with the lengths of the chunks that follow one another in it. A buffer is
            asked for when the one before is written, and let go of before the next but one is.

    Returns:
        Its size and checksums, of the bytes that were handed to the disk.
    """
    sink = storage.create(path)
    try:
        # One thread hashes while this one writes. Each takes a buffer as a whole: where training holds the
        # interpreter's lock, every return to Python waits for it, so there are to be few.
        with ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt-hash") as hashing:
            written = _Stream(sink, hashing).write(header, runs)
    except BaseException:
        sink.discard()
        raise
    sink.close()
    return written


class _Stream:
    """What goes to a sink, hashed on its way in the order in which it goes."""

    def __init__(self, sink: SinkFile, hashing: ThreadPoolExecutor) -> None:
        self._sink, self._hashing = sink, hashing
        self._whole = running_checksum()
        self._behind: deque[Future[list[tuple[str, ...]]]] = deque()
        self._found: list[tuple[str, ...]] = []
        self._gathered = bytearray()
        self._lengths: list[int] = []
        self._size = 0

    def write(self, header: bytes, runs: Iterable[tuple[Any, Sequence[int]]]) -> WrittenFile:
        """Write everything."""
        self._hand_on(memoryview(header), ())
        for buffer, lengths in runs:
            view = memoryview(buffer)
            if len(view) < _SMALL:
                self._gathered += view
                self._lengths += lengths
                if len(self._gathered) >= _GATHERED:
                    self._flush()
            else:
                self._flush()
                self._hand_on(view, lengths)
        self._flush()
        self._catch_up(0)
        return WrittenFile(self._size, self._whole.hexdigest(), self._found)

    def _flush(self) -> None:
        if self._lengths:
            gathered, lengths = self._gathered, self._lengths
            self._gathered, self._lengths = bytearray(), []
            self._hand_on(memoryview(gathered), lengths)

    def _hand_on(self, view: memoryview, lengths: Sequence[int]) -> None:
        self._behind.append(self._hashing.submit(self._digest, view, lengths))
        self._size += len(view)
        self._sink.write(view)
        self._catch_up(_AHEAD)

    def _catch_up(self, behind: int) -> None:
        while len(self._behind) > behind:
            self._found += self._behind.popleft().result()

    def _digest(self, view: memoryview, lengths: Sequence[int]) -> list[tuple[str, ...]]:
        """Hash a buffer as part of the whole, and each piece of its chunks by itself."""
        self._whole.update(view)
        found, at = [], 0
        for length in lengths:
            ends = pieces(length, PIECE_BYTES)
            found.append(tuple(checksum(view[at + start : at + stop]) for start, stop in ends))
            at += length
        return found
