"""Files of folders that nobody vouches for: looked at before they are opened."""

import stat
from pathlib import Path

from titan_ckpt.errors import CheckpointError


def file_size(path: Path, most: int | None = None) -> int:
    """Return a file's length.

    Args:
        path: the file.
        most: a longer one is refused.

    Raises:
        CheckpointError: when there is none, it is too long, or it is no regular file: who opens a pipe waits for ever.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} does not read ({error.strerror or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} is longer than any file of its kind ({most} bytes)")
    return found.st_size
