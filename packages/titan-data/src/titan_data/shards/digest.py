"""Digests of large files: of samples, and of all of it."""

import hashlib
from pathlib import Path

from titan_data.errors import DataError

_SAMPLES = 64
_SAMPLE_SIZE = 4096
_CHUNK = 1 << 24  # bytes


def sample_digest(path: Path) -> str:
    """Digest a file's size and 64 samples of 4 KiB, spread evenly over it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            sha = hashlib.sha256(str(size).encode())
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_SIZE) * number // (_SAMPLES - 1))
                sha.update(file.read(_SAMPLE_SIZE))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return sha.hexdigest()[:16]


def check_digest(path: Path, start: int, sha256: str) -> None:
    """Read a file from a byte on, and check the SHA-256 of what is read.

    Raises:
        DataError: If it is another one, or the file cannot be read.
    """
    sha = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while data := file.read(_CHUNK):
                sha.update(data)  # without the GIL
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if sha.hexdigest() != sha256:
        raise DataError("the checksum does not match: the contents have changed since they were written")
