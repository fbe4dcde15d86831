"""Directories and files that appear atomically: written under a staging name, synced, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import local_path, reason_of


@contextmanager
def new_directory(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """Provide a staging directory that gets its final name if the block succeeds and is removed otherwise.

    Args:
        directory: The final path; it must not exist, or be an empty directory.
        replace: Whether it may be a directory with files, which is replaced by two renames. A kill between them leaves
            neither under the final name; both are complete then.

    Yields:
        The directory to write to.

    Raises:
        CheckpointError: If the final path exists, or the directory cannot be written.
    """
    directory = local_path(directory)
    filled = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if filled and not (replace and directory.is_dir()):
        raise CheckpointError(f"{directory} exists: give a new name, existing files are never overwritten")
    staging, old = _staging_of(directory), _staging_of(directory)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        if filled:
            directory.rename(old)
        staging.rename(directory)
        sync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"could not write {directory}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Provide the path of a staging file that gets its final name if the block succeeds and is removed otherwise.

    Args:
        path: The final path; it must not exist.

    Yields:
        The path to write to.

    Raises:
        CheckpointError: If the final path exists, or the file cannot be written.
    """
    path = local_path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists: give a new name, existing files are never overwritten")
    staging = _staging_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        sync(staging)
        staging.rename(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {reason_of(error)}") from error
    finally:
        staging.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _staging_of(path: Path) -> Path:
    return path.parent / f".staging-{path.name}-{secrets.token_hex(4)}"
