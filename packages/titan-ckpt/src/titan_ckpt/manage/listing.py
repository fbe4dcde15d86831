"""What a folder of checkpoints holds: the steps, the pointer to the latest, the pins."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import Manifest, folder_name, read_manifest, step_of
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage

LATEST = "latest"
PINS = "pins"
_PIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a folder.

    Attributes:
        step: the step it was saved at.
        path: its own folder, as a path or URL.
        metadata: what was given to `save`.
        manifest: all that is known of it.
    """

    step: int
    path: str
    metadata: dict[str, Any]
    manifest: Manifest = field(repr=False)


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """List the checkpoints whose manifest reads; their other files are not looked at (see `verify`).

    Args:
        folder: where a Checkpointer saves, as a path or URL; it need not exist.

    Returns:
        The checkpoints, oldest step first.
    """
    storage = open_storage(str(folder))
    found = []
    for name in step_names(storage):
        try:
            found.append(info_of(storage, name, read_manifest(storage, name)))
        except CheckpointError:
            continue
    return found


def pin(folder: str | Path, step: int, name: str) -> None:
    """Keep a checkpoint for good, whatever the retention, until the name is unpinned or given to another step.

    Args:
        folder: where the checkpoints are.
        step: the checkpoint's step.
        name: what to call it: letters, digits, `_`, `.`, `-`.

    Raises:
        CheckpointError: when there is no such checkpoint, or the name will not do.
    """
    storage = open_storage(str(folder))
    if not _PIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} cannot be the name of a pin: use at most 100 letters, digits, '_', '.' and '-'"
        )
    read_manifest(storage, folder_name(step))
    storage.replace(f"{PINS}/{name}", f"{folder_name(step)}\n".encode())


def unpin(folder: str | Path, name: str) -> None:
    """Take a pin away; the checkpoint is then kept or removed as any other.

    Args:
        folder: where the checkpoints are.
        name: the pin's.

    Raises:
        CheckpointError: when there is no pin of that name.
    """
    storage = open_storage(str(folder))
    if name not in storage.names(PINS):
        raise CheckpointError(f"{storage.url} has no pin {name!r}; it has {sorted(storage.names(PINS)) or 'none'}")
    storage.delete(f"{PINS}/{name}")


def pins_in(storage: Storage) -> dict[str, str]:
    """Return the pins: which name holds which checkpoint's folder."""
    return {name: _pointed_at(storage, f"{PINS}/{name}") for name in storage.names(PINS)}


def latest_in(storage: Storage) -> str | None:
    """Return the folder name that the pointer to the latest holds, or None where there is no pointer."""
    try:
        return _pointed_at(storage, LATEST)
    except FileNotFoundError:
        return None


def step_names(storage: Storage) -> list[str]:
    """Return the names that are a step's, oldest step first, whatever is behind them."""
    steps = {step: name for name in storage.names() if (step := step_of(name)) is not None}
    return [steps[step] for step in sorted(steps)]


def info_of(storage: Storage, name: str, manifest: Manifest) -> CheckpointInfo:
    """Return what callers are told of a checkpoint."""
    return CheckpointInfo(manifest.step, f"{storage.url.rstrip('/')}/{name}", manifest.metadata, manifest)


def _pointed_at(storage: Storage, path: str) -> str:
    return storage.read(path).decode("utf-8", "replace").strip()
