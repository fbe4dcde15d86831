"""Folders and files that appear at one stroke: written under another name, synced, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_ckpt.errors import CheckpointError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a staging folder, which takes its final name when the block ends well and is removed otherwise.

    Args:
        folder: the final name; nothing but an empty folder may be there.

    Yields:
        The folder to write to.

    Raises:
        CheckpointError: when something is there, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists: give a new name, nothing is ever overwritten")
    staging = _staging_of(folder)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        os.rename(staging, folder)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a staging file's name; the file takes its final name when the block ends well and is removed otherwise.

    Args:
        path: the final name; nothing may be there.

    Yields:
        The name to write to.

    Raises:
        CheckpointError: when something is there, or the file cannot be written.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists: give a new name, nothing is ever overwritten")
    staging = _staging_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        sync(staging)
        os.rename(staging, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
    finally:
        staging.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _staging_of(path: Path) -> Path:
    return path.parent / f".staging-{path.name}-{secrets.token_hex(4)}"
