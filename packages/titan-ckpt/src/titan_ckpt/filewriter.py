"""One safetensors file, streamed: the header is known beforehand, and what passes by is hashed on its way."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.storage import SinkFile, Storage

_AHEAD = 4  # pieces written but not yet hashed
_SMALL = 64 << 10  # bytes: chunks below this are gathered, for handing on each by itself costs more than the bytes do
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


def write_file(storage: Storage, path: str, header: bytes, chunks: Iterable[Any]) -> WrittenFile:
    """Write a file, in large pieces one after the other, and sync it to the disk.

    Args:
        storage: where.
        path: the file, which must not be there yet.
        header: its first bytes.
        chunks: the rest, as buffers of bytes; each is asked for when the one before is written.

    Returns:
        Its size and checksums, of the bytes that were handed to the disk.
    """
    sink = storage.create(path)
    try:
        # One thread hashes while this one writes: both leave the interpreter's lock alone meanwhile.
        with ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt-hash") as hashing:
            written = _Stream(sink, hashing).write(header, chunks)
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
        self._behind: deque[Future[str]] = deque()
        self._gathered = bytearray()
        self._size = 0

    def write(self, header: bytes, chunks: Iterable[Any]) -> WrittenFile:
        """Write everything."""
        found: list[list[str | Future[str]]] = []
        self._gather(memoryview(header))
        for chunk in chunks:
            view = memoryview(chunk)
            if len(view) < _SMALL:
                self._gather(view)
                found.append([checksum(view)] if len(view) else [])
            else:
                self._flush()
                found.append([self._hand_on(view[start:stop]) for start, stop in pieces(len(view), PIECE_BYTES)])
        self._flush()
        told = [tuple(one if isinstance(one, str) else one.result() for one in chunk) for chunk in found]
        while self._behind:
            self._behind.popleft().result()
        return WrittenFile(self._size, self._whole.hexdigest(), told)

    def _gather(self, view: memoryview) -> None:
        self._gathered += view
        if len(self._gathered) >= _GATHERED:
            self._flush()

    def _flush(self) -> None:
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._hand_on(memoryview(gathered))

    def _hand_on(self, view: memoryview) -> Future[str]:
        digest = self._hashing.submit(self._digest, view)
        self._behind.append(digest)
        self._size += len(view)
        self._sink.write(view)
        while len(self._behind) > _AHEAD:
            self._behind.popleft().result()
        return digest

    def _digest(self, view: memoryview) -> str:
        self._whole.update(view)
        return checksum(view)


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return a tensor's elements in row-major order as a buffer of bytes: its own memory where that is possible."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()
