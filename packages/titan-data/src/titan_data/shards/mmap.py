"""Memory-mapped arrays of files."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError


def map_array(path: Path, dtype: npt.DTypeLike, count: int, offset: int = 0) -> npt.NDArray[Any]:
    """Map part of a file as an array.

    Args:
        path: The file's path.
        dtype: Type of the entries.
        count: Number of entries.
        offset: Where the first entry begins, in bytes.

    Returns:
        `[count]`, read-only. A `numpy.ndarray` rather than a `numpy.memmap`, whose slices cost several times as much.

    Raises:
        DataError: If the file cannot be opened, or is too small.
    """
    needed = offset + count * np.dtype(dtype).itemsize
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < needed:
                raise DataError(f"{path} is truncated: it has {size} bytes instead of {needed}")
            if count == 0:
                return np.empty(0, dtype=dtype)
            # The map lives as long as the array, and as any view of it.
            return np.frombuffer(mmap.mmap(file.fileno(), needed, access=mmap.ACCESS_READ), dtype, count, offset)
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}") from None
