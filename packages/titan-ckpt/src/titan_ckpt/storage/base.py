"""Where checkpoints lie: what titan-ckpt asks of a file system or an object store.

Two kinds answer: `local.LocalStorage` for a folder, `objectstore.ObjectStorage` for whatever fsspec reaches by a URL.
Paths are relative to the folder of checkpoints, with "/" between their parts, whatever the machine.
"""

from typing import NamedTuple, Protocol


class SourceFile(Protocol):
    """A file that is read."""

    @property
    def size(self) -> int:
        """Its length in bytes."""
        ...

    def read_into(self, start: int, buffer: memoryview, *, once: bool = False) -> None:
        """Fill a buffer; raises OSError when the file ends before it is full.

        Args:
            start: where in the file to begin, in bytes.
            buffer: what to fill.
            once: whether these bytes are wanted by nobody else on this machine, so that no cache need hold them.
        """
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class SinkFile(Protocol):
    """A file that is written from its beginning to its end."""

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        ...

    def close(self) -> None:
        """Make what was written durable; only then is it there."""
        ...

    def discard(self) -> None:
        """Give up on it; what is there of it is cleared away with its checkpoint."""
        ...


class Staged(NamedTuple):
    """A checkpoint that is being written.

    Attributes:
        final: the name it will have, e.g. `step-00000100`.
        folder: the folder that holds it now.
        prefix: what the names of its tensor files begin with, relative to the checkpoint.
    """

    final: str
    folder: str
    prefix: str


class Storage(Protocol):
    """A folder of checkpoints. Any method may raise OSError; FileNotFoundError says that something is not there."""

    @property
    def url(self) -> str:
        """The folder, as a person would name it."""
        ...

    @property
    def parallel(self) -> int:
        """How many reads are best in flight at once."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly in a folder, in no order; none when there is no such folder."""
        ...

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        ...

    def read(self, path: str) -> bytes:
        """Return a small file's content."""
        ...

    def open(self, path: str) -> SourceFile:
        """Open a file to read parts of it; several threads may."""
        ...

    def create(self, path: str) -> SinkFile:
        """Begin a file that is not there yet, and the folders above it."""
        ...

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file at one stroke: whoever reads it finds the old content or the new."""
        ...

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small file unless there is one; tell whether it was written."""
        ...

    def delete(self, path: str) -> None:
        """Delete a file; one that is not there is no error."""
        ...

    def has(self, name: str) -> bool:
        """Tell whether a checkpoint is there under a name, sound or damaged; what a killed save left is none."""
        ...

    def stage(self, final: str) -> Staged:
        """Begin a checkpoint, in a place that no reader looks at."""
        ...

    def publish(self, staged: Staged, manifest: bytes) -> None:
        """Make a staged checkpoint one that readers see, by one act: before it there is none, after it there is.

        Raises:
            FileExistsError: when a checkpoint of that name is there.
        """
        ...

    def abandon(self, staged: Staged) -> None:
        """Delete what was staged."""
        ...

    def remove(self, name: str) -> None:
        """Delete a checkpoint; it stops being one before its files go."""
        ...

    def set_aside(self, name: str) -> str:
        """Give a damaged checkpoint a name that no reader looks at; return that name."""
        ...

    def clear_leftovers(self) -> list[str]:
        """Delete what killed jobs left half-written or half-deleted; called by the one who holds the folder's lock.

        Returns:
            The names of what was deleted.
        """
        ...
