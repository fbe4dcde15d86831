"""The content of a directory of checkpoints: steps, the `latest` pointer, pins."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import Manifest, directory_name, read_manifest, step_of
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage

LATEST = "latest"
PINS = "pins"
_PIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a directory.

    Attributes:
        step: The step it was saved at.
        path: Its own directory, as a path or URL.
        metadata: The metadata given to `save`.
        manifest: Its manifest.
    """

    step: int
    path: str
    metadata: dict[str, Any]
    manifest: Manifest = field(repr=False)


def list_checkpoints(directory: str | Path) -> list[CheckpointInfo]:
    """List the checkpoints with a readable manifest. Their other files are not checked (see `verify`).

    Args:
        directory: The directory of checkpoints, as a path or URL; it need not exist.

    Returns:
        The checkpoints, oldest step first.

    Example:
        >>> for info in list_checkpoints("runs/x/checkpoints"):
        ...     print(info.step, info.path, info.metadata)
        100 .../runs/x/checkpoints/step-00000100 {'tokens_seen': 4096}
    """
    storage = open_storage(str(directory))
    found = []
    for name in step_names(storage):
        try:
            found.append(info_of(storage, name, read_manifest(storage, name)))
        except CheckpointError:
            continue
    return found


def pin(directory: str | Path, step: int, name: str) -> None:
    """Keep a checkpoint whatever the retention policy, until the pin is removed or moved to another step.

    Args:
        directory: The directory of checkpoints.
        step: The checkpoint's step.
        name: The pin's name: letters, digits, `_`, `.`, `-`.

    Raises:
        CheckpointError: If there is no such checkpoint, or the name is invalid.
    """
    storage = open_storage(str(directory))
    if not _PIN_NAME.fullmatch(name):
        raise CheckpointError(f"invalid pin name {name!r}: use at most 100 letters, digits, '_', '.' and '-'")
    read_manifest(storage, directory_name(step))
    storage.replace(f"{PINS}/{name}", f"{directory_name(step)}\n".encode())


def unpin(directory: str | Path, name: str) -> None:
    """Remove a pin; the checkpoint is then subject to the retention policy again.

    Args:
        directory: The directory of checkpoints.
        name: The pin's name.

    Raises:
        CheckpointError: If there is no pin of that name.
    """
    storage = open_storage(str(directory))
    if name not in storage.names(PINS):
        raise CheckpointError(f"{storage.url} has no pin {name!r}; its pins: {sorted(storage.names(PINS)) or 'none'}")
    storage.delete(f"{PINS}/{name}")


def pins_in(storage: Storage) -> dict[str, str]:
    """Return the pins, by name, each with the directory name of its checkpoint."""
    return {name: _pointed_at(storage, f"{PINS}/{name}") for name in storage.names(PINS)}


def latest_in(storage: Storage) -> str | None:
    """Return the directory name that `latest` points to, or None if there is no such pointer."""
    try:
        return _pointed_at(storage, LATEST)
    except FileNotFoundError:
        return None


def step_names(storage: Storage) -> list[str]:
    """Return the names that are a step's, oldest step first, without looking inside."""
    steps = {step: name for name in storage.names() if (step := step_of(name)) is not None}
    return [steps[step] for step in sorted(steps)]


def info_of(storage: Storage, name: str, manifest: Manifest) -> CheckpointInfo:
    """Return the public record of a checkpoint."""
    return CheckpointInfo(manifest.step, f"{storage.url.rstrip('/')}/{name}", manifest.metadata, manifest)


def _pointed_at(storage: Storage, path: str) -> str:
    return storage.read(path).decode("utf-8", "replace").strip()
