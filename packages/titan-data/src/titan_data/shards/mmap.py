"""Files seen as arrays, without reading them."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_data.errors import DataError


def map_array(path: Path, dtype: npt.DTypeLike, count: int, offset: int = 0) -> npt.NDArray[Any]:
    """See part of a file as an array.

    Args:
        path: of the file.
        dtype: of the entries.
        count: number of entries.
        offset: where the first one begins, in bytes.

    Returns:
        `[count]`, read-only. A plain array rather than a `numpy.memmap`, whose slices cost several times as much.

    Raises:
        DataError: the file cannot be opened, or is too small for that.
    """
    needed = offset + count * np.dtype(dtype).itemsize
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < needed:
                raise DataError(f"{path} is cut off: it has {size} bytes, but should have {needed}")
            if count == 0:
                return np.empty(0, dtype=dtype)
            # The map lives as long as the array, and as any view of it.
            return np.frombuffer(mmap.mmap(file.fileno(), needed, access=mmap.ACCESS_READ), dtype, count, offset)
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}") from None
