"""A directory that keeps where the records of files begin, and how many there are, from one run to the next."""

import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.storage import DataFile


class IndexDirectory:
    """Indices by name, size and version (time of modification or ETag) of their files: a changed file has none.

    A corrupt index is built again. Several processes may write at once, as each index is written atomically.

    Args:
        directory: Created if missing.

    Raises:
        DataError: If it cannot be created.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).expanduser()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"index_directory {directory} cannot be created: {error.strerror}") from error

    def load_offsets(self, file: DataFile, unit: str) -> npt.NDArray[np.int64] | None:
        """Return int64 `[N + 1]`, where each record begins and the last ends, memory-mapped; None without an index."""
        try:
            saved = np.load(self._path(file, unit, "npy"), mmap_mode="r", allow_pickle=False)
        except Exception:  # a corrupt header raises anything
            return None
        if saved.ndim != 1 or saved.dtype != np.int64 or len(saved) < 2:
            return None
        offsets: npt.NDArray[np.int64] = np.asarray(saved[:-1])
        return offsets if offsets[-1] == file.size and int(saved[-1]) == zlib.crc32(offsets.data) else None

    def save_offsets(self, file: DataFile, unit: str, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Write an index and return it memory-mapped, so that it need not be held in memory."""
        with_checksum = np.append(offsets, zlib.crc32(np.ascontiguousarray(offsets).data))
        path = self._path(file, unit, "npy")
        self._write(path, lambda out: np.save(out, with_checksum, allow_pickle=False))
        saved = self.load_offsets(file, unit)
        return offsets if saved is None else saved

    def load_count(self, file: DataFile, unit: str) -> int | None:
        """Return the number of records, or None if it was not saved."""
        path = self._path(file, unit, "json")
        try:
            saved = json.loads(path.read_bytes())
            count = saved["records"]
            valid = isinstance(count, int) and count >= 0 and saved["crc32"] == _crc32_of_count(path, count)
        except Exception:  # a corrupt file raises anything, a RecursionError included
            return None
        return count if valid else None

    def save_count(self, file: DataFile, unit: str, count: int) -> None:
        """Save the number of records."""
        path = self._path(file, unit, "json")
        data = json.dumps({"file": file.name, "records": count, "crc32": _crc32_of_count(path, count)}).encode()
        self._write(path, lambda out: out.write(data))

    def _path(self, file: DataFile, unit: str, suffix: str) -> Path:
        identity = json.dumps([file.label, file.path, file.size, file.version, unit])
        return self._directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.{suffix}"

    def _write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".tmp", delete=False) as out:
                temporary = Path(out.name)
                try:
                    write(out)
                    out.close()
                    temporary.replace(path)
                except BaseException:
                    temporary.unlink()
                    raise
        except OSError as error:
            raise DataError(f"index_directory {self._directory} cannot be written: {error.strerror}") from error


def _crc32_of_count(path: Path, count: int) -> int:
    return zlib.crc32(f"{path.name} {count}".encode())
