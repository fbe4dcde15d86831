"""Checks of untrusted files before they are opened."""

import os
import stat
from pathlib import Path

from titan_ckpt.errors import CheckpointError

_MOST_SPARSE = 64  # times as many bytes as it occupies: file systems that compress weights save much less
_SMALL = 64 << 20  # bytes that any file may have


def file_size(path: Path, most: int | None = None) -> int:
    """Return a regular file's size in bytes.

    Args:
        path: The file.
        most: Largest size to accept.

    Raises:
        CheckpointError: If it does not exist, is too long, is not a regular file (opening a pipe would block forever),
            or is sparse: a file of a few blocks can claim to have terabytes.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} has {found.st_size} bytes, the limit for such a file is {most}")
    if found.st_size > _SMALL and found.st_size > _MOST_SPARSE * _occupied(found):
        raise CheckpointError(
            f"{path} has {found.st_size} bytes but occupies only {_occupied(found)}: it is a hole, as an interrupted "
            "download leaves it. Download or copy it again"
        )
    return found.st_size


def _occupied(found: os.stat_result) -> int:
    """Return the bytes that a file occupies on its disk; its size where the file system does not say."""
    return min(found.st_size, getattr(found, "st_blocks", 0) * 512 or found.st_size)
