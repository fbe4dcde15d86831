"""Bytes out of .gz and .zst files, with an error of its own where a file is cut off or damaged."""

import io
import zlib
from typing import Any, Protocol

from titan_data.errors import DataError
from titan_data.files.retry import Retry
from titan_data.files.storage import BLOCK, DataFile, StorageReader

_PIECE = 64 << 10  # compressed bytes at a time: a thousandfold of it still fits into memory


class CorruptFileError(Exception):
    """The rest of a file cannot be read, whatever is tried; the message says why."""


class _Decompressor(Protocol):
    """What zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(path: str) -> str | None:
    """Tell "gz" or "zst" by a file's suffix; None for anything else."""
    lower = path.lower()
    return "gz" if lower.endswith(".gz") else "zst" if lower.endswith((".zst", ".zstd")) else None


def require_compression(compression: str | None) -> None:
    """Make sure that what reads a compression is installed.

    Raises:
        DataError: it is not; the message says how to install it.
    """
    if compression == "zst":
        _import_zstandard()


def open_bytes(file: DataFile, retry: Retry) -> io.BufferedReader:
    """Open a file for reading, decompressed.

    Args:
        file: which one.
        retry: how often to try where the storage fails.

    Returns:
        The reader. It raises DataError where the storage fails and `CorruptFileError` where a compressed file is
        damaged, after all that could be read before the damage.
    """
    raw: io.RawIOBase = StorageReader(file, retry)
    if (compression := compression_of(file.path.partition("?")[0])) is not None:
        raw = _DecompressedReader(io.BufferedReader(raw, BLOCK), compression)
    return io.BufferedReader(raw, BLOCK)


class _DecompressedReader(io.RawIOBase):
    """The contents of a compressed file, whose frames (gzip: members) follow one another."""

    def __init__(self, compressed: io.BufferedReader, compression: str) -> None:
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
            # Always a full piece, short reads of a network or not: where damaged data end must not depend on them.
            piece = self._compressed.read(_PIECE)
            if not piece:
                if self._decompressor is None:
                    return 0
                self._failure = CorruptFileError(f"the .{self._compression} file is cut off")
            else:
                self._pending = memoryview(self._decompress(piece))
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()

    def _decompress(self, piece: bytes) -> bytes:
        """Decompress a piece; damage found in it is kept for later."""
        whole = []
        while piece:
            if self._decompressor is None:
                # gzip files may be padded with zeros between and after their members.
                if self._compression == "gz" and not (piece := piece.lstrip(b"\0")):
                    break
                self._decompressor = _new_decompressor(self._compression)
            try:
                whole.append(self._decompressor.decompress(piece))
            except MemoryError:
                raise
            except Exception as error:  # zstandard's error is an Exception; its module may not be there to name it
                self._failure = CorruptFileError(f"the .{self._compression} file is damaged: {error}")
                break
            piece = b""
            if self._decompressor.eof:
                piece = self._decompressor.unused_data
                self._decompressor = None
        return b"".join(whole)


def _new_decompressor(compression: str) -> _Decompressor:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    # 2 GiB, what `zstd --long=31` may need: the default refuses files that the command line tool has written.
    decompressor: _Decompressor = _import_zstandard().ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return decompressor


def _import_zstandard() -> Any:
    try:
        import zstandard  # late: an optional extra
    except ImportError:
        raise DataError("files that end in .zst need an extra: pip install 'titan-data[zstd]'") from None
    return zstandard
