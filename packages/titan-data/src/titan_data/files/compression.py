"""Decompression of .gz and .zst files, with `CorruptFileError` for truncated and corrupt ones.

`open_bytes` is called by the formats for every file, compressed or not.
"""

import contextlib
import io
import zlib
from typing import Any, Protocol

from titan_data.errors import DataError
from titan_data.files.retry import Retry
from titan_data.files.storage import BLOCK, DataFile, StorageReader

_READ_BYTES = 64 << 10  # compressed bytes at a time: even a thousandfold expansion fits into memory


class CorruptFileError(Exception):
    """The rest of a file cannot be read, and a retry would not help; the message says why.

    Attributes:
        lost: How much cannot be read, in bytes or rows.
    """

    def __init__(self, why: str, lost: str) -> None:
        super().__init__(why)
        self.lost = lost


class WrongSchemaError(CorruptFileError):
    """A file has no texts where they are looked for."""


class _Decompressor(Protocol):
    """What zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(path: str) -> str | None:
    """Return "gz" or "zst" by a file's suffix; None for anything else."""
    lower = path.lower()
    return "gz" if lower.endswith(".gz") else "zst" if lower.endswith((".zst", ".zstd")) else None


def require_compression(compression: str | None) -> None:
    """Check that the package for a compression is installed.

    Raises:
        DataError: If it is missing; the message says how to install it.
    """
    if compression == "zst":
        _import_zstandard()


def open_bytes(file: DataFile, retry: Retry) -> io.BufferedReader:
    """Open a file for reading, decompressed.

    Args:
        file: The file.
        retry: How reads are retried.

    Returns:
        The reader. It raises DataError if storage fails, and `CorruptFileError` where a compressed file is corrupt,
        after everything before that.
    """
    raw: io.RawIOBase = StorageReader(file, retry)
    if (compression := compression_of(file.suffixes)) is not None:
        raw = _DecompressedReader(io.BufferedReader(raw, BLOCK), compression, file.size)
    return io.BufferedReader(raw, BLOCK)


def first_bytes(file: DataFile, head: bytes) -> bytes:
    """Decompress as much of a file as can be decompressed of its first bytes."""
    if (compression := compression_of(file.suffixes)) is None:
        return head
    reader = _DecompressedReader(io.BufferedReader(io.BytesIO(head)), compression, None)
    found = bytearray()
    buffer = bytearray(BLOCK)
    with contextlib.suppress(CorruptFileError):
        while len(found) < BLOCK and (size := reader.readinto(buffer)):
            found += buffer[:size]
    return bytes(found)


class _DecompressedReader(io.RawIOBase):
    """The contents of a compressed file of one or more frames (gzip: members)."""

    def __init__(self, compressed: io.BufferedReader, compression: str, size: int | None) -> None:
        self._size = size
        self._compressed = compressed
        self._compression = compression
        self._decompressor: _Decompressor | None = None
        self._pending = memoryview(b"")
        self._failure: CorruptFileError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            # Always a full block, whatever a network returns: where corrupt data end must not depend on short reads.
            data = self._compressed.read(_READ_BYTES)
            if not data:
                if self._decompressor is None:
                    return 0
                self._failure = CorruptFileError(
                    f"the .{self._compression} file is truncated",
                    f"what followed its {self._compressed.tell():,} bytes",
                )
            else:
                self._pending = memoryview(self._decompress(data))
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()

    def _decompress(self, data: bytes) -> bytes:
        """Decompress a block; an error in it is raised after what comes before it has been read."""
        decompressed = []
        while data:
            if self._decompressor is None:
                # gzip files may be padded with zeros between and after their members.
                if self._compression == "gz" and not (data := data.lstrip(b"\0")):
                    break
                self._decompressor = _new_decompressor(self._compression)
            try:
                decompressed.append(self._decompressor.decompress(data))
            except MemoryError:
                raise
            except Exception as error:  # zstandard's error is an Exception; the module may not be installed
                # Before the block that failed everything has been read, and of it perhaps a part.
                begin = max(self._compressed.tell() - _READ_BYTES, 0)
                lost = "the rest" if self._size is None else f"up to {self._size - begin:,} of its {self._size:,} bytes"
                self._failure = CorruptFileError(f"the .{self._compression} file is corrupt: {error}", lost)
                break
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data
                self._decompressor = None
        return b"".join(decompressed)


def _new_decompressor(compression: str) -> _Decompressor:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    # 2 GiB, as `zstd --long=31` may need: the default rejects files that the command line tool has written.
    decompressor: _Decompressor = _import_zstandard().ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return decompressor


def _import_zstandard() -> Any:
    try:
        import zstandard  # here: an optional extra
    except ImportError:
        raise DataError("files that end in .zst need an extra: pip install 'titan-data[zstd]'") from None
    return zstandard
