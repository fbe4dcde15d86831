"""The interface between titan-ckpt and a file system or an object store.

Two implementations: `local.LocalStorage` for a directory, `object_store.ObjectStorage` for any fsspec URL. Paths are
relative to the directory of checkpoints and use "/" on every operating system.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from titan_ckpt.messages import get_logger, reason_of

logger = get_logger(__name__)


class DamagedFileError(OSError):
    """A small file of the directory that cannot be what it should be, whoever reads it and whenever."""


class SourceFile(Protocol):
    """A file opened for reading."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read_into(self, start: int, buffer: memoryview, *, bypass_cache: bool = False) -> None:
        """Fill a buffer from a position in the file.

        Args:
            start: Position of the first byte.
            buffer: The memory to fill.
            bypass_cache: Whether to keep these bytes out of the operating system's page cache: no other process on
                this machine needs them.

        Raises:
            OSError: If the file ends before the buffer is full.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class SinkFile(Protocol):
    """A file written sequentially from its beginning."""

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        ...

    def close(self) -> None:
        """Make the content durable and close the file. Before this returns the file may not exist."""
        ...

    def discard(self) -> None:
        """Abandon the file. Remains are deleted together with the pending checkpoint."""
        ...


class PendingCheckpoint(NamedTuple):
    """A checkpoint that is being written and that no reader sees yet.

    Attributes:
        final: The name it gets when published, e.g. `step-00000100`.
        directory: The directory its files are written to, relative to the storage.
        prefix: Prefix of the names of its tensor files, relative to the checkpoint.
    """

    final: str
    directory: str
    prefix: str


class Storage(Protocol):
    """A directory of checkpoints. Any method may raise OSError; FileNotFoundError means that something is absent."""

    @property
    def url(self) -> str:
        """The directory as a path or URL, for messages."""
        ...

    @property
    def parallel(self) -> int:
        """The number of concurrent reads that gives the best throughput."""
        ...

    def names(self, directory: str = "") -> list[str]:
        """Return the names directly in a directory, unordered; empty if it does not exist."""
        ...

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        ...

    def read(self, path: str, most: int) -> bytes:
        """Return the content of a small file.

        Args:
            path: The file.
            most: Length in bytes beyond which it is refused without reading it.

        Raises:
            OSError: If it cannot be read, or is longer.
        """
        ...

    def open(self, path: str) -> SourceFile:
        """Open a file for partial reads; thread-safe."""
        ...

    def create(self, path: str) -> SinkFile:
        """Create a new file, and its parent directories."""
        ...

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file atomically: readers see the old content or the new."""
        ...

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small file if it does not exist yet; return whether it was written."""
        ...

    def delete(self, path: str) -> None:
        """Delete a file. A missing file is not an error."""
        ...

    def has(self, name: str) -> bool:
        """Return whether a checkpoint exists, valid or corrupt. Remains of a killed save do not count."""
        ...

    def begin(self, final: str) -> PendingCheckpoint:
        """Begin a checkpoint in a place that no reader looks at."""
        ...

    def publish(self, pending: PendingCheckpoint, manifest: bytes) -> None:
        """Write the manifest and make the checkpoint visible to readers in one atomic operation.

        Raises:
            FileExistsError: If a checkpoint of that name exists.
        """
        ...

    def abort(self, pending: PendingCheckpoint) -> None:
        """Delete the files of a pending checkpoint."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint. It becomes invalid before its files are deleted."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Give a checkpoint another name, valid or corrupt. Repeated after an interruption, it completes the act."""
        ...

    def clear_leftovers(self) -> list[str]:
        """Delete what killed jobs left partly written or partly deleted. Only the holder of the lock may call this.

        What cannot be deleted is logged and left.

        Returns:
            The deleted names.
        """
        ...


def check_length(path: str, nbytes: int, most: int) -> None:
    """Check the length of a file before it is read.

    Raises:
        DamagedFileError: If it is too long.
    """
    if nbytes > most:
        raise DamagedFileError(f"{path} has {nbytes} bytes, the limit for such a file is {most}")


def attempt_each(names: Iterable[str], delete: Callable[[str], None]) -> list[str]:
    """Delete what can be deleted; log one warning that lists the rest.

    Returns:
        The deleted names.
    """
    deleted, failed = [], []
    for name in names:
        try:
            delete(name)
            deleted.append(name)
        except Exception as error:  # clients of object stores have exceptions of their own
            failed.append(f"{name} ({reason_of(error)})")
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        logger.warning(
            "could not remove old checkpoints or leftovers: %s%s; delete them by hand", ", ".join(failed[:3]), more
        )
    return deleted
