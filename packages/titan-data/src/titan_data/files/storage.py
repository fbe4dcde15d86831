"""One file on any storage that fsspec reaches, read through failures of the network."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import fsspec

from titan_data.errors import DataError
from titan_data.files.retry import Retry, describe_error, may_pass, within

BLOCK = 1 << 20  # bytes per read
_REMOTE_BLOCK = 4 << 20  # bytes per request, where fsspec reads ahead
_SAMPLE = 64 << 10  # bytes of a file's begin and of its end that its digest is made of


@dataclass(frozen=True)
class DataFile:
    """A file as it was found.

    Attributes:
        name: path below the folder that the pattern names: stays when the whole corpus is moved.
        label: what to call it in messages: the whole path or URL, without a query (which may hold a secret).
        path: what the file system calls it.
        url: a URL or path that leads fsspec to the file system.
        options: further arguments for that.
        local: whether it is on this machine's own file systems.
        size: bytes; None where the server does not say.
        version: an ETag or time of change; None where there is none. For noticing changes within a run only.
    """

    name: str
    label: str
    path: str
    url: str
    options: Mapping[str, Any] = field(repr=False)
    local: bool
    size: int | None
    version: str | None


def open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Find the file system that a path or URL means.

    Args:
        url: a local path, or any URL that fsspec knows.
        options: arguments of the file system, such as credentials.

    Returns:
        The fsspec file system, and the path in its terms.

    Raises:
        DataError: an unknown protocol, one whose package is not installed, or wrong options.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise DataError(f"{without_query(url)} cannot be opened: {error}") from error
    return filesystem, path


def without_query(url: str) -> str:
    """Take the query off a web address."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def describe(info: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Read size and version of a file from what fsspec tells about it."""
    version = next((str(info[key]).strip('"') for key in ("ETag", "etag", "mtime") if info.get(key)), None)
    return info.get("size"), version


class StorageReader(io.RawIOBase):
    """A file opened for reading, which opens it anew and goes on at the same byte when reading fails.

    Every `OSError` of the storage becomes a DataError that names the file, once the attempts are used up. Reading
    also fails if the file is not the one that was found (other size or version).

    Args:
        file: which one.
        retry: how often to try.
    """

    def __init__(self, file: DataFile, retry: Retry) -> None:
        self._file = file
        self._retry = retry
        self._filesystem, _ = open_filesystem(file.url, file.options)
        self._handle: Any = None
        self._at = 0  # the byte that the handle stands at
        self._position = 0
        self.sequential = False
        """Whether the server can only give the file from its beginning (found out when it is tried)."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: where the server cannot, the bytes in between are read and dropped."""
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
                raise DataError(f"{self._file.label}: the server does not tell its size; download the file first")
            offset += self._file.size
        self._position = offset
        return offset

    def readinto(self, buffer: Any, /) -> int:
        """Read up to as many bytes as there is room for; 0 at the end of the file."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._drop_handle()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._file.size is not None:
            size = min(size, self._file.size - self._position)
        if size <= 0:
            return b""
        for failures in count(1):
            handle, at = self._handle, self._at
            self._handle = None  # a read that fails spoils it; one that hangs may hold it for ever
            try:
                if self._file.local:
                    handle, data = self._attempt(handle, at, size)
                else:
                    attempt = partial(self._attempt, handle, at, size)
                    handle, data = within(self._retry.stall, attempt)
                self._position += len(data)
                self._handle, self._at = handle, self._position
                return data
            except DataError:
                raise
            except FileNotFoundError:
                raise DataError(f"{self._file.label} has disappeared: put it back, and resume") from None
            except Exception as error:
                if not may_pass(error):
                    raise DataError(f"{self._file.label} cannot be read: {describe_error(error)}") from error
                if failures == self._retry.attempts:
                    raise DataError(
                        f"{self._file.label} could not be read at byte {self._position} after {failures} "
                        f"attempt{'s' if failures > 1 else ''}: {describe_error(error)}"
                    ) from error
                self._retry.wait(failures)
        raise AssertionError("count() has no end")

    def _attempt(self, handle: Any, at: int, size: int) -> tuple[Any, bytes]:
        """Read once, with an open file that stands at byte `at`; without one, open it.

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
                # So says fsspec of a web server that gives whole files and no ranges.
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
        """Open the file at its beginning, if it still is the one that was found."""
        self._filesystem.invalidate_cache()
        size, version = describe(self._filesystem.info(self._file.path))
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
    """Say that a file is not what it was."""
    return (
        f"{file.label} was changed while it was in use: data of a run must stay as it is; put the old file back, or "
        "start a new run"
    )


def digest_sample(file: DataFile, retry: Retry) -> str:
    """Digest a file's size, its first 64 KiB and its last: enough to notice almost any edit, at two short reads.

    Args:
        file: which one.
        retry: how often to try.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{file.size}\n".encode())
    with StorageReader(file, retry) as reader:
        for begin, end in _sample_ranges(file.size):
            reader.seek(begin)
            while reader.tell() < end and (data := reader.read(end - reader.tell())):
                digest.update(data)
    return digest.hexdigest()[:16]


def _sample_ranges(size: int | None) -> Iterator[tuple[int, int]]:
    if size is None or size <= _SAMPLE:
        yield 0, _SAMPLE
    else:
        yield 0, _SAMPLE
        yield max(_SAMPLE, size - _SAMPLE), size
