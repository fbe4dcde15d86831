"""Checkpoints in an object store, or anything else fsspec reaches: published by their manifest, written last.

There is no rename and no fsync; an object exists once its upload has finished. So a checkpoint's files are uploaded
under its final name, where readers ignore them until there is a manifest. Each attempt writes to a sub-directory of its
own, so that a late upload of a killed job cannot replace a file of the job that took its place.
"""

import contextlib
import re
import secrets
from typing import Any

import fsspec

from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import reason_of
from titan_ckpt.storage.base import PendingCheckpoint, SinkFile, SourceFile, attempt_each, check_length

_MANIFEST = "manifest.json"
_STEP = re.compile(r"step-[0-9]{8,}")
_PART_BYTES = 64 << 20  # of a multi-part upload: the memory used per file being written
_WRITE_BYTES = 8 << 20


class ObjectStorage:
    """A prefix of an object store, given by an fsspec URL."""

    parallel = 16  # a single request is slow, many together are fast

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self._fs, self._root = _connect(url)

    def names(self, directory: str = "") -> list[str]:
        """Return the names directly under a prefix; empty if there is nothing."""
        at = self._at(directory)
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(at, detail=False)
        except FileNotFoundError:
            return []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found if str(path).strip("/") != at.strip("/")}
        return list(names - {""})

    def size(self, path: str) -> int:
        """Return an object's length in bytes."""
        self._fs.invalidate_cache()
        info = self._fs.info(self._at(path))
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def read(self, path: str, most: int) -> bytes:
        """Return the content of a small object."""
        check_length(path, self.size(path), most)
        content: bytes = self._fs.cat_file(self._at(path))
        return content

    def open(self, path: str) -> SourceFile:
        """Open an object for ranged reads."""
        return _Source(self._fs, self._at(path), self.size(path))

    def create(self, path: str) -> SinkFile:
        """Begin an object; it exists once it is closed."""
        target = self._at(path)
        self._make_parent(target)
        return _Sink(self._fs.open(target, "wb", block_size=_PART_BYTES))

    def replace(self, path: str, content: bytes) -> None:
        """Write a small object, by one upload."""
        target = self._at(path)
        self._make_parent(target)
        self._fs.pipe_file(target, content)

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small object if it does not exist yet; return whether it was written.

        Most stores cannot do this atomically. The object is read back after writing, so of two jobs that write at the
        same time, one nearly always learns that it lost. Callers that depend on it must check again later.
        """
        if self._exists(path):
            return False
        self.replace(path, content)
        return self.read(path, most=max(len(content), 1 << 16)) == content

    def delete(self, path: str) -> None:
        """Delete an object. A missing object is not an error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def has(self, name: str) -> bool:
        """Return whether a checkpoint exists: whether it has a manifest."""
        return self._exists(f"{name}/{_MANIFEST}")

    def begin(self, final: str) -> PendingCheckpoint:
        """Begin a checkpoint under its final name, in a sub-directory of this attempt's own."""
        self._delete_all(final)  # what a killed attempt left
        return PendingCheckpoint(final, final, f"{secrets.token_hex(4)}/")

    def publish(self, pending: PendingCheckpoint, manifest: bytes) -> None:
        """Write the manifest."""
        path = f"{pending.final}/{_MANIFEST}"
        if self.has(pending.final):
            raise FileExistsError(f"{self.url}/{path}")
        self.replace(path, manifest)

    def abort(self, pending: PendingCheckpoint) -> None:
        """Delete what this attempt wrote, unless it became a checkpoint."""
        try:
            if not self.has(pending.final):
                self._delete_all(pending.final)
        except Exception:
            pass  # without a manifest it is not a checkpoint, and a later save deletes it

    def remove(self, name: str) -> None:
        """Delete a checkpoint, the manifest first."""
        self.delete(f"{name}/{_MANIFEST}")
        self._delete_all(name)

    def rename(self, name: str, new: str) -> None:
        """Copy a checkpoint to another name, the manifest last, and delete the original."""
        found = [str(path) for path in self._fs.find(self._at(name))]
        for path in sorted(found, key=lambda path: path.endswith(f"/{_MANIFEST}")):
            inside = path.rpartition(f"{name}/")[2]
            self._make_parent(self._at(f"{new}/{inside}"))
            self._fs.copy(path, self._at(f"{new}/{inside}"))
        self.remove(name)

    def clear_leftovers(self) -> list[str]:
        """Delete the files of steps without a manifest: a save or a removal was killed."""
        found = [name for name in self.names() if _STEP.fullmatch(name) and not self.has(name)]
        return attempt_each(found, self._delete_all)

    def _exists(self, path: str) -> bool:
        # Not fsspec's `exists`: it returns False when the store does not answer, and what "does not exist" is deleted.
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def _delete_all(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)
        self._fs.invalidate_cache()

    def _make_parent(self, target: str) -> None:
        # Object stores have no directories, but fsspec's memory and SFTP file systems do.
        parent = target.rpartition("/")[0]
        if parent and parent != self._root:
            self._fs.makedirs(parent, exist_ok=True)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it.

    Raises:
        CheckpointError: If the scheme is unknown, its implementation is not installed, or it refuses to start.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CheckpointError(f"{url}: {error}") from error
    except Exception as error:  # each implementation has exceptions of its own
        scheme = url.partition("://")[0]
        raise CheckpointError(
            f"{url}: cannot be opened ({reason_of(error)}); give a path, or a URL that fsspec knows, such as s3:// "
            f"instead of {scheme}://"
        ) from error
    return _Client(fs, url), root.rstrip("/")


class _Client:
    """An fsspec file system, or a file of it, whose every error is an OSError: missing credentials, for example."""

    def __init__(self, inner: Any, url: str) -> None:
        self._inner, self._url = inner, url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = found(*args, **kwargs)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{self._url}: {reason_of(error)}") from error
            return _Client(result, self._url) if name == "open" else result

        return call


class _Source:
    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size

    def read_into(self, start: int, buffer: memoryview, *, bypass_cache: bool = False) -> None:
        content = self._fs.cat_file(self._path, start=start, end=start + len(buffer)) if len(buffer) else b""
        if len(content) != len(buffer):
            raise OSError(f"the object ends at byte {start + len(content)}")
        buffer[:] = content

    def close(self) -> None:
        pass


class _Sink:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        for start in range(0, len(view), _WRITE_BYTES):  # fsspec copies each write before sending it
            self._file.write(view[start : start + _WRITE_BYTES])

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        # Closing would finish the upload. Dropped, the object never exists: stores expire unfinished uploads.
        if hasattr(self._file, "discard"):
            self._file.discard()
