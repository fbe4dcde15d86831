"""Checkpoints in an object store, or in whatever else fsspec reaches: published by their manifest, written last.

There is no rename and no fsync: an object is there, whole, once its upload is finished. So a checkpoint's files are
uploaded under its final name, where no reader looks at them before there is a manifest. Each attempt has a folder of
its own in there, so that an upload of a killed job that ends late cannot replace a file of the job that took its place.
"""

import contextlib
import re
import secrets
from typing import Any, cast

import fsspec

from titan_ckpt.storage.base import SinkFile, SourceFile, Staged

_MANIFEST = "manifest.json"
_STEP = re.compile(r"step-[0-9]{8,}")
_PART_BYTES = 64 << 20  # of a multi-part upload: what is held in memory per file being written
_WRITE_BYTES = 8 << 20


class ObjectStorage:
    """A prefix of an object store, by a URL of fsspec."""

    parallel = 16  # one request is slow, many are fast

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly under a prefix; none when there is nothing."""
        at = self._at(folder)
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
        told = self._fs.info(self._at(path))
        if told["type"] != "file":
            raise FileNotFoundError(path)
        return int(told["size"])

    def read(self, path: str) -> bytes:
        """Return a small object's content."""
        return cast(bytes, self._fs.cat_file(self._at(path)))

    def open(self, path: str) -> SourceFile:
        """Open an object to read ranges of it."""
        return _Source(self._fs, self._at(path), self.size(path))

    def create(self, path: str) -> SinkFile:
        """Begin an object; it appears when it is closed."""
        whole = self._at(path)
        self._make_folder(whole)
        return _Sink(self._fs.open(whole, "wb", block_size=_PART_BYTES))

    def replace(self, path: str, content: bytes) -> None:
        """Write a small object, by one upload."""
        whole = self._at(path)
        self._make_folder(whole)
        self._fs.pipe_file(whole, content)

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small object unless there is one.

        Most stores cannot do this at one stroke. What was written is read again, so of two that come at the same time,
        but for the narrowest of moments, one is told the truth; whoever relies on it has to look again later.
        """
        if self._exists(path):
            return False
        self.replace(path, content)
        return self.read(path) == content

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def has(self, name: str) -> bool:
        """Tell whether a checkpoint is there under a name: whether it has a manifest."""
        return self._exists(f"{name}/{_MANIFEST}")

    def stage(self, final: str) -> Staged:
        """Begin a checkpoint under its final name, in a folder of this attempt's own."""
        self._delete_all(final)  # what a killed attempt left there
        return Staged(final, final, f"{secrets.token_hex(4)}/")

    def publish(self, staged: Staged, manifest: bytes) -> None:
        """Write the manifest."""
        path = f"{staged.final}/{_MANIFEST}"
        if self.has(staged.final):
            raise FileExistsError(f"{self.url}/{path}")
        self.replace(path, manifest)

    def abandon(self, staged: Staged) -> None:
        """Delete what this attempt wrote, unless it became a checkpoint."""
        try:
            if not self.has(staged.final):
                self._delete_all(staged.final)
        except Exception:
            pass  # it is no checkpoint in any case, and cleared away by a later save

    def remove(self, name: str) -> None:
        """Delete a checkpoint, the manifest first."""
        self.delete(f"{name}/{_MANIFEST}")
        self._delete_all(name)

    def set_aside(self, name: str) -> str:
        """Copy a damaged checkpoint to another name and delete it here."""
        aside = f".damaged-{name}-{secrets.token_hex(4)}"
        for path in self._fs.find(self._at(name)):
            inside = str(path).rpartition(f"{name}/")[2]
            self._make_folder(self._at(f"{aside}/{inside}"))
            self._fs.copy(path, self._at(f"{aside}/{inside}"))
        self.remove(name)
        return aside

    def clear_leftovers(self) -> list[str]:
        """Delete the files of steps that have no manifest: killed amid saving, or amid deleting."""
        found = [name for name in self.names() if _STEP.fullmatch(name) and not self.has(name)]
        for name in found:
            self._delete_all(name)
        return found

    def _exists(self, path: str) -> bool:
        # fsspec's own `exists` says no when the store does not answer, and what is not there gets deleted.
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def _delete_all(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)
        self._fs.invalidate_cache()

    def _make_folder(self, whole: str) -> None:
        # Stores have no folders, but fsspec's memory and SFTP file systems do.
        parent = whole.rpartition("/")[0]
        if parent and parent != self._root:
            self._fs.makedirs(parent, exist_ok=True)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


class _Source:
    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size

    def read_into(self, start: int, buffer: memoryview, *, once: bool = False) -> None:
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
        for start in range(0, len(view), _WRITE_BYTES):  # fsspec copies what it gets before it sends it
            self._file.write(view[start : start + _WRITE_BYTES])

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        # Closing would finish the upload. Dropped, it never appears: a store forgets parts that no one finishes.
        if hasattr(self._file, "discard"):
            self._file.discard()
