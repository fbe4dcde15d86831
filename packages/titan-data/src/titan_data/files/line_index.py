"""A folder that remembers where the records of files begin and how many there are, from one run to the next."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError
from titan_data.files.storage import DataFile


class IndexFolder:
    """Indices by name, size and version (time of change or ETag) of their files: a changed file has none.

    What is damaged is made anew. Several processes may write at once: each index appears as a whole.

    Args:
        folder: made if it is not there.

    Raises:
        DataError: it cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the index folder {folder} cannot be made: {error.strerror}") from error

    def load_offsets(self, file: DataFile, unit: str) -> npt.NDArray[np.int64] | None:
        """Map int64 `[N + 1]`, where each record begins and the last ends, or None if there is no index."""
        try:
            offsets: npt.NDArray[np.int64] = np.load(self._path(file, unit, "npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        whole = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) > 0 and offsets[-1] == file.size
        return np.asarray(offsets) if whole else None

    def save_offsets(self, file: DataFile, unit: str, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Keep an index; returns it as it is in the folder, so that it need not be held in memory."""
        self._write(self._path(file, unit, "npy"), lambda out: np.save(out, offsets, allow_pickle=False))
        saved = self.load_offsets(file, unit)
        return offsets if saved is None else saved

    def load_count(self, file: DataFile, unit: str) -> int | None:
        """Return the number of records, or None if it is not known."""
        try:
            count = json.loads(self._path(file, unit, "json").read_bytes())["records"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return count if isinstance(count, int) and count >= 0 else None

    def save_count(self, file: DataFile, unit: str, count: int) -> None:
        """Keep the number of records."""
        data = json.dumps({"file": file.name, "records": count}).encode()
        self._write(self._path(file, unit, "json"), lambda out: out.write(data))

    def _path(self, file: DataFile, unit: str, suffix: str) -> Path:
        identity = json.dumps([file.label, file.size, file.version, unit])
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.{suffix}"

    def _write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".tmp", delete=False) as out:
                try:
                    write(out)
                    out.close()
                    os.replace(out.name, path)
                except BaseException:
                    os.unlink(out.name)
                    raise
        except OSError as error:
            raise DataError(f"the index folder {self._folder} cannot be written: {error.strerror}") from error
