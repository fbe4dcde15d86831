"""Checkpoints in a directory of a file system: published by one rename, after everything is synced to the disk."""

import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from titan_ckpt.messages import local_path
from titan_ckpt.storage.base import (
    DamagedFileError,
    PendingCheckpoint,
    SinkFile,
    SourceFile,
    attempt_each,
    check_length,
)
from titan_ckpt.storage.direct_io import LEAST, DirectFile, is_cached

_AT_ONCE = 256 << 20  # bytes per system call
_LEFTOVER = re.compile(r"\.(staging|removing|writing)-.+-[0-9a-f]{8}")


class LocalStorage:
    """A directory that every rank sees, on a file system that honors `fsync` and atomic `rename`."""

    def __init__(self, directory: str) -> None:
        self._root = local_path(directory).absolute()
        self.url = str(self._root)
        self.parallel = 4

    def names(self, directory: str = "") -> list[str]:
        """Return the names directly in a directory; empty if it does not exist."""
        try:
            return os.listdir(self._root / directory)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        return self._inside(path).stat().st_size

    def read(self, path: str, most: int) -> bytes:
        """Return the content of a small file."""
        with self._inside(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_length(path, size, most)
            return file.read(size)  # allocated at once, so not `most`

    def open(self, path: str) -> SourceFile:
        """Open a file for partial reads."""
        return _Source(self._inside(path))

    def create(self, path: str) -> SinkFile:
        """Create a new file, and its parent directories."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return _Sink(target)

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file atomically, by a rename."""
        target = self._root / path
        temporary = self._write_temporary(target, content)
        try:
            os.replace(temporary, target)  # fails if the target is a directory
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small file if it does not exist yet; return whether it was written."""
        target = self._root / path
        temporary = self._write_temporary(target, content)
        try:
            os.link(temporary, target)  # fails if the target exists, and never shows a partial file
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def delete(self, path: str) -> None:
        """Delete a file. A missing file is not an error."""
        (self._root / path).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Return whether a checkpoint exists: a killed save leaves nothing under the final name."""
        return bool(self.names(name))

    def begin(self, final: str) -> PendingCheckpoint:
        """Begin a checkpoint under a staging name."""
        directory = _temporary_name("staging", final)
        (self._root / directory).mkdir(parents=True)
        return PendingCheckpoint(final, directory, "")

    def publish(self, pending: PendingCheckpoint, manifest: bytes) -> None:
        """Write the manifest, sync the directory, and rename it to its final name."""
        staging, final = self._root / pending.directory, self._root / pending.final
        sink = self.create(f"{pending.directory}/manifest.json")
        sink.write(manifest)
        sink.close()
        _sync_directory(staging)
        os.rename(staging, final)  # fails if `final` is a directory with files in it: nothing is ever overwritten
        _sync_directory(self._root)

    def abort(self, pending: PendingCheckpoint) -> None:
        """Delete the files of a pending checkpoint."""
        shutil.rmtree(self._root / pending.directory, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint. The rename comes first, so that a kill never leaves half of it under its name."""
        renamed = self._root / _temporary_name("removing", name)
        (self._root / name).rename(renamed)
        _delete(renamed)

    def rename(self, name: str, new: str) -> None:
        """Give a checkpoint another name."""
        (self._root / name).rename(self._root / new)
        _sync_directory(self._root)

    def clear_leftovers(self) -> list[str]:
        """Delete what killed jobs left partly written or partly deleted."""
        found = [name for name in self.names() if _LEFTOVER.fullmatch(name)]
        return attempt_each(found, lambda name: _delete(self._root / name))

    def _inside(self, path: str) -> Path:
        """Return the path of a file to read; refuse links that leave the checkpoint, and special files.

        The checkpoint's own directory may be a link (its owner's choice); a file within it that points elsewhere would
        let a downloaded checkpoint read any file of this machine.
        """
        target = self._root / path
        directory = os.path.realpath(self._root / path.split("/")[0])
        real = os.path.realpath(target)
        if real != directory and not real.startswith(directory + os.sep):
            raise DamagedFileError(f"{path} is a link to {real}, outside of its directory")
        if not stat.S_ISREG(os.stat(real).st_mode):  # e.g. a pipe: opening one blocks forever
            raise DamagedFileError(f"{path} is not a regular file")
        return target

    def _write_temporary(self, target: Path, content: bytes) -> Path:
        temporary = self._root / _temporary_name("writing", target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = _Sink(temporary)
        try:
            sink.write(content)
            sink.close()
        except BaseException:
            sink.discard()
            raise
        return temporary


class _Source:
    """A file opened for reading."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = DirectFile(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size

    def read_into(self, start: int, buffer: memoryview, *, bypass_cache: bool = False) -> None:
        done = 0
        # The page cache is faster than any disk, so it is used where it holds the bytes. The middle page decides: those
        # at the ends may be cached because of a neighboring read.
        if bypass_cache and len(buffer) >= LEAST and not is_cached(self._handle, start + len(buffer) // 2):
            while count := self._direct.read(buffer[done:], start + done):
                done += count
        if done < len(buffer) and hasattr(os, "posix_fadvise"):
            # Request everything at once: the kernel's own read-ahead is small, and smaller with several threads.
            os.posix_fadvise(self._handle, start + done, len(buffer) - done, os.POSIX_FADV_WILLNEED)
        while done < len(buffer):
            count = os.preadv(self._handle, [buffer[done:]], start + done)
            if count == 0:
                raise OSError(f"the file ends at byte {start + done}")
            done += count

    def close(self) -> None:
        os.close(self._handle)
        self._direct.close()


class _Sink:
    """A new file. Page-aligned memory is written with direct I/O."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = DirectFile(path, os.O_WRONLY)

    def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while len(view):
            done = self._direct.write(view, self._at) or os.pwrite(self._handle, view[:_AT_ONCE], self._at)
            self._at += done
            view = view[done:]

    def close(self) -> None:
        os.fsync(self._handle)
        self._close_handles()

    def discard(self) -> None:
        self._close_handles()
        self._path.unlink(missing_ok=True)

    def _close_handles(self) -> None:
        os.close(self._handle)
        self._direct.close()


def _temporary_name(purpose: str, name: str) -> str:
    """Return a new hidden name, e.g. `.staging-step-00000100-1f2e3d4c`."""
    return f".{purpose}-{name}-{secrets.token_hex(4)}"


def _delete(path: Path) -> None:
    """Delete a file, a link, or a directory with its files."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable; syncing files covers only their content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
