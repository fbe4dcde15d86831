"""The files of a source with their versions: what `prepare` compares to notice that one was edited.

A fingerprint reads samples of files, so that a corpus can be moved and opened quickly; it does not see an edit in the
middle of a large file. A version (size, and time of modification or ETag) does, on the machine where it was taken.
"""

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from titan_data.errors import DataError
from titan_data.files.retry import AttemptsFailedError, Retry, call_with_retries
from titan_data.files.storage import BLOCK, DataFile, StorageReader, open_filesystem, size_and_version

_THREADS = 16


class InputFiles:
    """The files that a source reads, as they were when it was opened.

    Args:
        files: The files; their names are unique.
        retry: How reads are retried.
    """

    def __init__(self, files: Sequence[DataFile], retry: Retry) -> None:
        self._files = {file.name: file for file in files}
        self._retry = retry

    def __len__(self) -> int:
        return len(self._files)

    def versions(self) -> dict[str, str]:
        """Return size, and time of modification or ETag, of each file by name, as of when the source was opened."""
        return {name: _describe(file.size, file.version) for name, file in self._files.items()}

    def current_versions(self) -> dict[str, str]:
        """Return the versions of now."""

        def look(file: DataFile) -> str:
            filesystem, _ = open_filesystem(file.url, file.options)
            filesystem.invalidate_cache()
            try:
                return _describe(*size_and_version(call_with_retries(lambda: filesystem.info(file.path), self._retry)))
            except AttemptsFailedError as failed:
                raise DataError(f"{file.label} cannot be accessed: {failed}") from failed.error

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(self._files, pool.map(look, self._files.values()), strict=True))

    def checksums(self, names: Collection[str]) -> dict[str, str]:
        """Read files and return the SHA-256 of each by name."""

        def digest(name: str) -> str:
            sha = hashlib.sha256()
            with StorageReader(self._files[name], self._retry) as reader:
                while data := reader.read(BLOCK):
                    sha.update(data)
            return sha.hexdigest()

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(digest, names), strict=True))


@runtime_checkable
class HasInputs(Protocol):
    """A source that reads files."""

    @property
    def inputs(self) -> InputFiles | None:
        """The files; None if they are not known."""
        ...


@runtime_checkable
class HasBytesRead(Protocol):
    """A stream of files that knows how far it has been read."""

    @property
    def bytes_total(self) -> int | None:
        """Bytes of all files; None if a server does not report a size."""
        ...

    def bytes_before(self, shard: int) -> int:
        """Bytes of the files of all shards before one, in `range(shards + 1)`."""
        ...

    def bytes_read(self, shard: int) -> int:
        """Bytes that have been read, if the shards before `shard` are finished and it is being read."""
        ...


def inputs_of(source: object) -> InputFiles | None:
    """Return the files that a source reads; None for a source of another kind."""
    return source.inputs if isinstance(source, HasInputs) else None


def _describe(size: int | None, version: str | None) -> str:
    return f"{'unknown size' if size is None else f'{size} bytes'}, {version or 'no version'}"
