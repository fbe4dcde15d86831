"""Clearing away: old checkpoints, and what killed runs left behind."""

import logging
import re
import secrets
import shutil
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import read_manifest, step_folders, step_of, verify

_LEFTOVER = re.compile(r"\.(staging|removing)-step-[0-9]{8,}-[0-9a-f]{8}")

logger = logging.getLogger(__name__)


def aside(folder: Path, why: str, name: str) -> Path:
    """Return a fresh name in `folder` for what is on its way in or out, e.g. `.staging-step-00000100-1f2e3d4c`."""
    return folder / f".{why}-{name}-{secrets.token_hex(4)}"


def prune(folder: Path, published: int, keep_last: int | None) -> list[int]:
    """Remove the checkpoints that are older than the newest `keep_last`.

    What to remove is decided from the disk alone. The step just published is always kept, newer ones (a run went back
    to before them) are left alone, and one with files missing or cut short does not count as kept. Folders without
    a manifest that reads are never touched.

    Args:
        folder: where the checkpoints are.
        published: the step that was just published.
        keep_last: how many to keep, the published one among them; None for all.

    Returns:
        The steps that were removed.
    """
    if keep_last is None:
        return []
    kept, removed = 1, []
    for path in reversed(step_folders(folder)):
        step = step_of(path.name)
        if step is None or step >= published or not _has_manifest(path):
            continue
        if kept < keep_last:
            kept += not verify(path, level="size")
            continue
        # Renamed first, it is gone at one stroke: a kill amid the deletion leaves no half of a checkpoint.
        doomed = path.rename(aside(folder, "removing", path.name))
        shutil.rmtree(doomed)
        removed.append(step)
    return removed


def clear_leftovers(folder: Path) -> None:
    """Remove the staging folders and half-removed checkpoints of runs that were killed.

    Called when no save is in flight.

    Args:
        folder: where the checkpoints are.
    """
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            logger.info("removing %s, left by a run that was cut off", path)
            shutil.rmtree(path)


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True
