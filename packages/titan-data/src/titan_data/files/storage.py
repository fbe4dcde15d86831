"""One file on any storage that fsspec reaches: opened, read with retries, and digested.

`DataFile` is what `glob.find_files` returns; formats read it through `StorageReader`.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec

from titan_data.errors import DataError
from titan_data.files.reading import reading
from titan_data.files.retry import AttemptsFailedError, Retry, call_with_retries, within

BLOCK = 1 << 20  # bytes per read
_REMOTE_BLOCK = 4 << 20  # bytes per request, where fsspec reads ahead
_SAMPLE = 64 << 10  # bytes of a file's beginning and of its end that its digest is made of


@dataclass
class ReadProgress:
    """How far a file has been read, for progress bars.

    Attributes:
        position: The byte that is read next.
    """

    position: int = 0


@dataclass(frozen=True)
class DataFile:
    """A file as it was found.

    Attributes:
        name: Path below the folder that the pattern names; does not change when the whole corpus is moved.
        label: The file's name in messages: the full path or URL, without a query (which may contain a secret).
        path: The file's path in its file system.
        url: A URL or path by which fsspec finds the file system.
        options: Further arguments of the file system.
        local: Whether the file is on a file system of this machine.
        size: Size in bytes; None if the server does not report it.
        version: ETag or time of modification; None if there is none. To notice changes during a run.
    """

    name: str
    label: str
    path: str
    url: str
    options: Mapping[str, Any] = field(repr=False)
    local: bool
    size: int | None
    version: str | None
    progress: ReadProgress = field(default_factory=ReadProgress, compare=False, repr=False)

    @property
    def suffixes(self) -> str:
        """The end of the name by which formats and compressions are recognized, in lower case."""
        return without_query(self.path).rpartition("/")[2].lower()


def open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Open the file system of a path or URL.

    Args:
        url: A local path, or any URL that fsspec knows.
        options: Arguments of the file system, such as credentials.

    Returns:
        The fsspec file system, and the path within it.

    Raises:
        DataError: If the protocol is unknown, its package is not installed, or the options are wrong.
    """
    try:
        if os.path.isabs(url):  # names of files may contain "::", which in URLs joins file systems
            filesystem = fsspec.filesystem("file", **options)
            return filesystem, filesystem._strip_protocol(url)
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise DataError(f"{without_query(url)} cannot be opened: {error}") from error
    return filesystem, path


def without_query(url: str) -> str:
    """Remove the query of a web address."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def size_and_version(info: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Read a file's size and version from fsspec's info."""
    version = next((str(info[key]).strip('"') for key in ("ETag", "etag", "mtime") if info.get(key)), None)
    return info.get("size"), version


class StorageReader(io.RawIOBase):
    """A file opened for reading that reopens it and continues at the same byte when reading fails.

    Every `OSError` of the storage becomes a DataError that names the file, once the attempts are used up. Reading
    also fails if the file is not the one that was found (other size or version).

    Args:
        file: The file.
        retry: How reads are retried.
    """

    def __init__(self, file: DataFile, retry: Retry) -> None:
        self._file = file
        self._retry = retry
        self._filesystem, _ = open_filesystem(file.url, file.options)
        self._handle: Any = None
        self._at = 0  # the byte that the handle is at
        self._position = 0
        self.sequential = False
        """Whether the server can only send the file from its beginning (found out by trying)."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: if the server cannot seek, the bytes in between are read and dropped."""
        return True

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a byte; costs nothing until something is read."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            if self._file.size is None:
                raise DataError(f"{self._file.label}: the server does not report its size; download the file first")
            offset += self._file.size
        self._position = offset
        return offset

    def readinto(self, buffer: Any, /) -> int:
        """Read up to the size of the buffer; 0 at the end of the file."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file; may be called more than once."""
        self._drop_handle()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._file.size is not None:
            size = min(size, self._file.size - self._position)
        if size <= 0:
            return b""
        try:
            with reading(self._file.label):
                handle, data = call_with_retries(partial(self._read_once, size), self._retry)
        except AttemptsFailedError as failed:
            if isinstance(failed.error, FileNotFoundError):
                raise DataError(f"{self._file.label} has disappeared: restore it, and resume") from None
            if not failed.temporary:
                raise DataError(f"{self._file.label} cannot be read: {failed}") from failed.error
            raise DataError(
                f"{self._file.label} could not be read at byte {self._position} after {failed.failures} "
                f"attempt{'s' if failed.failures > 1 else ''}: {failed}"
            ) from failed.error
        self._position += len(data)
        self._file.progress.position = self._position
        self._handle, self._at = handle, self._position
        return data

    def _read_once(self, size: int) -> tuple[Any, bytes]:
        handle, at = self._handle, self._at
        self._handle = None  # a read that fails invalidates it; one that hangs may hold it forever
        if self._file.local:
            return self._attempt(handle, at, size)
        return within(self._retry.stall, partial(self._attempt, handle, at, size))

    def _attempt(self, handle: Any, at: int, size: int) -> tuple[Any, bytes]:
        """Read once, with an open file that is at byte `at`; without one, open it.

        Changes nothing of this object but `sequential`, as it may be abandoned halfway.
        """
        if not self.sequential:
            try:
                if handle is None:
                    handle, at = self._open(), 0
                if at != self._position:
                    handle.seek(self._position)
                return handle, self._some(handle, size)
            except DataError:
                raise
            except ValueError:
                # fsspec raises it for a web server that sends complete files and no ranges.
                if self._position == 0:
                    raise
                self.sequential = True
                handle = None
        if handle is None or at > self._position:
            handle, at = self._open(), 0
        while at < self._position:
            at += len(self._some(handle, min(self._position - at, BLOCK)))
        return handle, self._some(handle, size)

    def _some(self, handle: Any, size: int) -> bytes:
        data: bytes = handle.read(size)
        if not data and self._file.size is not None:
            raise OSError(f"the connection ended before the file's {self._file.size} bytes")
        return data

    def _open(self) -> Any:
        """Open the file at its beginning, if it is still the one that was found."""
        self._filesystem.invalidate_cache()
        size, version = size_and_version(self._filesystem.info(self._file.path))
        if (size, version) != (self._file.size, self._file.version):
            raise DataError(changed(self._file))
        if self._file.local:
            return self._filesystem.open(self._file.path, "rb")
        return self._filesystem.open(self._file.path, "rb", block_size=0 if self.sequential else _REMOTE_BLOCK)

    def _drop_handle(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def changed(file: DataFile) -> str:
    """Return the message for a file that has changed since it was found."""
    return (
        f"{file.label} was changed while it was in use: the data of a run must not change; restore the old file, or "
        "start a new run"
    )


def digest_sample(file: DataFile, retry: Retry) -> tuple[str, bytes]:
    """Digest a file's size, its first 64 KiB and its last: notices almost any edit, at the cost of two short reads.

    Args:
        file: The file.
        retry: How reads are retried.

    Returns:
        16 hexadecimal digits, and the first 64 KiB.
    """
    digest = hashlib.sha256(f"{file.size}\n".encode())
    head = b""
    with StorageReader(file, retry) as reader:
        for begin, end in _sample_ranges(file.size):
            reader.seek(begin)
            while reader.tell() < end and (data := reader.read(end - reader.tell())):
                digest.update(data)
                head += data if begin == 0 else b""
    return digest.hexdigest()[:16], head


def _sample_ranges(size: int | None) -> Iterator[tuple[int, int]]:
    if size is None or size <= _SAMPLE:
        yield 0, _SAMPLE
    else:
        yield 0, _SAMPLE
        yield max(_SAMPLE, size - _SAMPLE), size
