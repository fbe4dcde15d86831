"""Checks of untrusted files before they are opened."""

import stat
from pathlib import Path

from titan_ckpt.errors import CheckpointError


def file_size(path: Path, most: int | None = None) -> int:
    """Return a regular file's size in bytes.

    Args:
        path: The file.
        most: Largest size to accept.

    Raises:
        CheckpointError: If it does not exist, is too long, or is not a regular file (opening a pipe would block
            forever).
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} has {found.st_size} bytes, the limit for such a file is {most}")
    return found.st_size
