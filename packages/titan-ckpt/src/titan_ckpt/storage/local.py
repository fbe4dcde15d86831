"""Checkpoints in a folder of a file system: published by one rename, after everything is on the disk."""

import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from titan_ckpt.storage.base import SinkFile, SourceFile, Staged
from titan_ckpt.storage.direct_io import LEAST, DirectFile, is_remembered

_AT_ONCE = 256 << 20  # bytes
_LEFTOVER = re.compile(r"\.(staging|removing|writing)-.+-[0-9a-f]{8}")


class LocalStorage:
    """A folder that every rank sees. `fsync` and `rename` must mean there what they say."""

    def __init__(self, folder: str) -> None:
        self._root = Path(folder).absolute()
        self.url = str(self._root)
        self.parallel = 4

    def names(self, folder: str = "") -> list[str]:
        """Return the names directly in a folder; none when there is no such folder."""
        try:
            return os.listdir(self._root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        """Return a file's length in bytes."""
        return self._inside(path).stat().st_size

    def read(self, path: str) -> bytes:
        """Return a small file's content."""
        return self._inside(path).read_bytes()

    def open(self, path: str) -> SourceFile:
        """Open a file to read parts of it."""
        return _Source(self._inside(path))

    def create(self, path: str) -> SinkFile:
        """Begin a file that is not there yet, and the folders above it."""
        whole = self._root / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        return _Sink(whole)

    def replace(self, path: str, content: bytes) -> None:
        """Write a small file at one stroke, by a rename."""
        whole = self._root / path
        os.replace(self._written_aside(whole, content), whole)
        _sync_folder(whole.parent)

    def create_once(self, path: str, content: bytes) -> bool:
        """Write a small file unless there is one; tell whether it was written."""
        whole = self._root / path
        aside = self._written_aside(whole, content)
        try:
            os.link(aside, whole)  # fails where there is one, and never shows a half
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def delete(self, path: str) -> None:
        """Delete a file; one that is not there is no error."""
        (self._root / path).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Tell whether a checkpoint is there under a name: a save that is killed leaves nothing under it."""
        return bool(self.names(name))

    def stage(self, final: str) -> Staged:
        """Begin a checkpoint under a staging name."""
        folder = _aside("staging", final)
        (self._root / folder).mkdir(parents=True)
        return Staged(final, folder, "")

    def publish(self, staged: Staged, manifest: bytes) -> None:
        """Write the manifest, sync the folder, and rename it to what it is."""
        folder, final = self._root / staged.folder, self._root / staged.final
        sink = self.create(f"{staged.folder}/manifest.json")
        sink.write(manifest)
        sink.close()
        _sync_folder(folder)
        os.rename(folder, final)  # fails where something holds files under that name: nothing is ever overwritten
        _sync_folder(self._root)

    def abandon(self, staged: Staged) -> None:
        """Delete what was staged."""
        shutil.rmtree(self._root / staged.folder, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint; renamed first, it is gone at one stroke, and a kill leaves no half of it."""
        doomed = self._root / _aside("removing", name)
        (self._root / name).rename(doomed)
        shutil.rmtree(doomed)

    def set_aside(self, name: str) -> str:
        """Rename a damaged checkpoint; return its new name."""
        aside = _aside("damaged", name)
        (self._root / name).rename(self._root / aside)
        return aside

    def clear_leftovers(self) -> list[str]:
        """Delete what killed jobs left half-written or half-deleted."""
        found = [name for name in self.names() if _LEFTOVER.fullmatch(name)]
        for name in found:
            path = self._root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return found

    def _inside(self, path: str) -> Path:
        """Return where a file lies that is read: a plain file, not one that a link makes seem to be in its folder."""
        whole = self._root / path
        folder = os.path.realpath(self._root / path.split("/")[0])  # which may itself be a link, of whoever keeps it
        real = os.path.realpath(whole)
        if real != folder and not real.startswith(folder + os.sep):
            raise OSError(f"{path} is a link to {real}, outside of its folder")
        kind = os.stat(real).st_mode
        if not stat.S_ISREG(kind):  # a pipe, say, which who opens it waits for
            raise OSError(f"{path} is no regular file")
        return whole

    def _written_aside(self, whole: Path, content: bytes) -> Path:
        aside = self._root / _aside("writing", whole.name)
        whole.parent.mkdir(parents=True, exist_ok=True)
        sink = _Sink(aside)
        try:
            sink.write(content)
            sink.close()
        except BaseException:
            sink.discard()
            raise
        return aside


class _Source:
    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = DirectFile(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size

    def read_into(self, start: int, buffer: memoryview, *, once: bool = False) -> None:
        done = 0
        # Memory is quicker than any disk. One looks at the middle: the ends may be known from what lies beside them.
        if once and len(buffer) >= LEAST and not is_remembered(self._handle, start + len(buffer) // 2):
            while count := self._direct.read(buffer[done:], start + done):
                done += count
        if done < len(buffer) and hasattr(os, "posix_fadvise"):
            # All at once: the kernel by itself reads ahead little, and less when threads take turns in a file.
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
    """A new file. What lies at whole pages of memory goes to the disk directly."""

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
        self._let_go()

    def discard(self) -> None:
        self._let_go()
        self._path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        os.close(self._handle)
        self._direct.close()


def _aside(why: str, name: str) -> str:
    """Return a fresh name for what is on its way in or out, e.g. `.staging-step-00000100-1f2e3d4c`."""
    return f".{why}-{name}-{secrets.token_hex(4)}"


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, not only the bytes of its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
