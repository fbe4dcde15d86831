"""The content of a directory of checkpoints: steps, the `latest` pointer, pins."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.manifest import Manifest, directory_name, read_manifest, step_of
from titan_ckpt.messages import get_logger, reason_of
from titan_ckpt.storage.base import DamagedFileError, Storage
from titan_ckpt.storage.open import open_storage

LATEST = "latest"
PINS = "pins"
MOVES = ".moves"  # renames that have begun; see `lineage`
_MOVES_LIMIT, _POINTER_LIMIT = 1 << 24, 1 << 12  # bytes
_ASIDE = re.compile(r"\.(?:aside|damaged)-(step-[0-9]+)-[0-9a-f]{8}")
logger = get_logger(__name__)

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

    Raises:
        CheckpointError: If the directory cannot be read.

    Example:
        >>> for info in list_checkpoints("runs/x/checkpoints"):
        ...     print(info.step, info.path, info.metadata)
        100 .../runs/x/checkpoints/step-00000100 {'tokens_seen': 4096}
    """
    storage = open_storage(str(directory))
    found = []
    with system_errors(f"list {storage.url}"):
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
    with system_errors(f"write the pin {name} in {storage.url}"):
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
    with system_errors(f"remove the pin {name} of {storage.url}"):
        pins = sorted(storage.names(PINS))
        if name not in pins:
            raise CheckpointError(f"{storage.url} has no pin {name!r}; its pins: {pins or 'none'}")
        storage.delete(f"{PINS}/{name}")


def pins_in(storage: Storage) -> dict[str, str]:
    """Return the pins, by name, each with the directory name of its checkpoint.

    What cannot be a pin (a directory, a file that is too long or that names no checkpoint) is left out with a warning.

    Raises:
        OSError: If a pin cannot be read now: what it protects is not known.
    """
    found = {name: _pointed_at(storage, f"{PINS}/{name}") for name in storage.names(PINS)}
    return {name: target for name, target in found.items() if target is not None}


def latest_in(storage: Storage) -> str | None:
    """Return the directory name that `latest` points to; None if there is no such pointer, or it is damaged."""
    try:
        return _pointed_at(storage, LATEST)
    except OSError as error:
        logger.warning("%s/%s is ignored: %s", storage.url, LATEST, reason_of(error))
        return None


def point_at(storage: Storage, name: str) -> None:
    """Let `latest` hold a checkpoint's name; only log if it cannot be written, since readers do not need it."""
    try:
        storage.replace(LATEST, f"{name}\n".encode())
    except Exception as error:  # whatever a storage raises
        logger.warning("could not update %s/%s to %s: %s", storage.url, LATEST, name, reason_of(error))


def step_names(storage: Storage) -> list[str]:
    """Return the names that are a step's, oldest step first, without looking inside.

    A checkpoint that is about to be set aside does not count, even if the job that began it was killed.
    """
    names = storage.names()
    steps = {step: name for name in names if (step := step_of(name)) is not None}
    if MOVES in names and (plan := planned_moves(storage)) is not None:
        leaving = {old for old, new in plan.moves if new not in names}
        steps = {step: name for step, name in steps.items() if name not in leaving}
    return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True)
class PlannedMoves:
    """Renames that have begun and may not be complete.

    Attributes:
        moves: Old and new names, in order.
        latest: The name that `latest` points to afterwards.
    """

    moves: list[tuple[str, str]]
    latest: str | None


def planned_moves(storage: Storage) -> PlannedMoves | None:
    """Return the renames that have begun and may not be complete; None if there are none."""
    try:
        plan = json.loads(storage.read(MOVES, most=_MOVES_LIMIT))
        moves = [(old, new) for old, new in plan["moves"] if _is_checkpoint(old) and _is_checkpoint(new)]
        latest = plan["latest"]
        return PlannedMoves(moves, latest if latest is None or step_of(latest) is not None else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s/%s cannot be read (%s), ignored", storage.url, MOVES, reason_of(error))
        return None


def aside_names(storage: Storage) -> list[str]:
    """Return the names of checkpoints that were set aside, oldest step first."""
    found = {name: step for name in storage.names() if (step := step_of_aside(name)) is not None}
    return sorted(found, key=lambda name: (found[name], name))


def step_of_aside(name: str) -> int | None:
    """Return the step of a checkpoint that was set aside, by its name; None if it is not such a name."""
    found = _ASIDE.fullmatch(name)
    return step_of(found[1]) if found else None


def _is_checkpoint(name: str) -> bool:
    return step_of(name) is not None or step_of_aside(name) is not None


def info_of(storage: Storage, name: str, manifest: Manifest) -> CheckpointInfo:
    """Return the public record of a checkpoint."""
    return CheckpointInfo(manifest.step, f"{storage.url.rstrip('/')}/{name}", manifest.metadata, manifest)


def _pointed_at(storage: Storage, path: str) -> str | None:
    """Return the checkpoint's name in a pointer; None if there is none, with a warning if the pointer is damaged."""
    try:
        target = storage.read(path, most=_POINTER_LIMIT).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        logger.warning("%s/%s is damaged and ignored: %s", storage.url, path, reason_of(error))
        return None
    if not _is_checkpoint(target):
        logger.warning("%s/%s is damaged and ignored: it names %r, not a checkpoint", storage.url, path, target[:80])
        return None
    return target
