"""One safetensors file, streamed: the header is known beforehand, and what passes by is hashed on its way."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.storage import Storage

_AHEAD = 4  # pieces written but not yet hashed


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
    whole, size, found = running_checksum(), len(header), []

    def digest(piece: memoryview) -> str:
        whole.update(piece)
        return checksum(piece)

    try:
        whole.update(header)
        sink.write(header)
        # One thread hashes while this one writes: both leave the interpreter's lock alone meanwhile.
        with ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt-hash") as hashing:
            behind: deque[Future[str]] = deque()
            for chunk in chunks:
                view = memoryview(chunk)
                digests: list[Future[str]] = []
                for start, stop in pieces(len(view), PIECE_BYTES):
                    digests.append(hashing.submit(digest, view[start:stop]))
                    behind.append(digests[-1])
                    sink.write(view[start:stop])
                    while len(behind) > _AHEAD:
                        behind.popleft().result()
                found.append(digests)
                size += len(view)
        written = WrittenFile(size, whole.hexdigest(), [tuple(one.result() for one in chunk) for chunk in found])
    except BaseException:
        sink.discard()
        raise
    sink.close()
    return written


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return a tensor's elements in row-major order as a buffer of bytes: its own memory where that is possible."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy()
