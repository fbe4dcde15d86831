"""The line of a run: which checkpoints follow one another, and going back to an earlier one.

Each manifest lists the branches that lead to its checkpoint, each with its last step on that way; every rewind begins a
new branch. So membership in a line is read from two manifests, whatever was pruned between them. The checkpoints under
their steps' names are always those of one line, whose newest is its head. All others are set aside: renamed, so that
nobody takes them for a checkpoint of the run, and kept until somebody removes them.

Called by the checkpointer before its first save (`continue_line`), and by `titan-ckpt restore` (`restore`). Both hold
the directory's lock. Several names change in one act: `_MOVES` is written first, and whoever finds it completes it.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.manifest import Branches, Manifest, directory_name, read_manifest, step_of
from titan_ckpt.manage.listing import (
    MOVES,
    PINS,
    aside_names,
    pins_in,
    planned_moves,
    point_at,
    step_names,
    step_of_aside,
)
from titan_ckpt.messages import get_logger
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage

logger = get_logger(__name__)


@dataclass(frozen=True)
class Head:
    """The checkpoint that a run continues from, by loading it or by having saved it.

    Attributes:
        step: Its step.
        digest: Its manifest's digest.
        branches: Its line, see `Manifest.branches`.
    """

    step: int
    digest: str
    branches: Branches


@dataclass(frozen=True)
class Restored:
    """What `restore` did.

    Attributes:
        head: The name of the checkpoint that is now the newest.
        set_aside: The checkpoints that were set aside, by their old name with the new one.
        brought_back: The checkpoints that were set aside and are no longer, by their old name with the new one.
    """

    head: str
    set_aside: Mapping[str, str]
    brought_back: Mapping[str, str]


def new_branch() -> str:
    """Return a name for a branch that no other branch has."""
    return secrets.token_hex(8)


def head_of(manifest: Manifest) -> Head:
    """Return a checkpoint as the head of its line."""
    return Head(manifest.step, manifest.digest, manifest.branches)


def is_on_line(manifest: Manifest, head: Head) -> bool:
    """Return whether a checkpoint is the head or one of those that lead to it."""
    if not manifest.branches or manifest.step > head.step:
        return False
    own, _ = manifest.branches[-1]
    return any(name == own and (last is None or manifest.step <= last) for name, last in head.branches)


def continue_line(storage: Storage, head: Head | None) -> Head | None:
    """Make a run's head the newest checkpoint of the directory, before the run saves there for the first time.

    Later checkpoints are of a line that the run left by loading an earlier one: they are set aside. Rank 0 only.

    Args:
        storage: The directory; its lock is held.
        head: The run's head; None if it has neither loaded nor saved anything.

    Returns:
        The head, with the branch on which the run goes on.

    Raises:
        CheckpointError: If there are checkpoints but the run has not loaded one, or the head's step is now another
            checkpoint.
    """
    names = step_names(storage)
    if head is None:
        newest = next((name for name in reversed(names) if storage.has(name)), None)
        if newest is not None:
            raise CheckpointError(
                f"{storage.url} holds checkpoints, the newest is {newest}, and this run has loaded none of them: "
                "load one first to continue from it, or give another directory"
            )
        return None
    own = directory_name(head.step)
    if own in names and (found := _manifest(storage, own)) is not None and found.digest != head.digest:
        raise CheckpointError(
            f"{storage.url}/{own} is not the checkpoint that this run loaded or saved: it was replaced since. Load it "
            "again"
        )
    later = [name for name in names if (step := step_of(name)) is not None and step > head.step and storage.has(name)]
    aside = [name for name in aside_names(storage) if (step := step_of_aside(name)) is not None and step > head.step]
    if later:
        moves = {name: _aside_name(name) for name in later}
        _move(storage, moves, own if own in names else None)
        logger.warning(
            "%s: the run goes on from step %d, so later checkpoints are set aside: %s (see `titan-ckpt restore`)",
            storage.url,
            head.step,
            ", ".join(f"{name} is now {new}" for name, new in moves.items()),
        )
    if later or aside or not head.branches:
        head = replace(head, branches=fork(head))
    return head


def is_published(storage: Storage, head: Head) -> bool:
    """Return whether a checkpoint that was about to be published is there."""
    found = _manifest(storage, directory_name(head.step))
    return found is not None and found.digest == head.digest


def fork(head: Head) -> Branches:
    """Return the line of what follows a head on a new branch."""
    before = head.branches[:-1] + tuple((name, head.step) for name, _ in head.branches[-1:])
    return (*before, (new_branch(), None))


def restore(directory: str | Path, which: int | str) -> Restored:
    """Make a checkpoint the newest one of its directory, from which the next run resumes.

    Checkpoints that do not lead to it are set aside, and those that do are brought back if they were. Nothing is
    deleted.

    Args:
        directory: The directory of checkpoints, as a path or URL.
        which: The step, or the name of a checkpoint that was set aside as `titan-ckpt ls` shows it.

    Returns:
        What changed.

    Raises:
        CheckpointError: If there is no such checkpoint, if several that were set aside have this step, or if a job
            writes to the directory.
    """
    storage = open_storage(str(directory))
    with system_errors(f"restore a checkpoint of {storage.url}"):
        if not storage.names():
            raise CheckpointError(f"{directory}: no such directory, or it is empty")
        lock = DirectoryLock(storage)
        try:
            finish_moves(storage)
            name = _find(storage, which)
            head = head_of(read_manifest(storage, name))
            moves = _moves_to(storage, name, head)
            _move(storage, moves, directory_name(head.step))
        finally:
            lock.release()
    away = {old: new for old, new in moves.items() if step_of(old) is not None}
    return Restored(directory_name(head.step), away, {old: new for old, new in moves.items() if old not in away})


def finish_moves(storage: Storage) -> None:
    """Complete the renames that an interrupted rewind began. Only the holder of the lock may call this."""
    plan = planned_moves(storage)
    if plan is not None:
        _carry_out(storage, plan.moves, plan.latest)


def _find(storage: Storage, which: int | str) -> str:
    """Return the name of the checkpoint that is meant."""
    aside = aside_names(storage)
    if isinstance(which, str):
        if which not in aside:
            raise CheckpointError(f"{storage.url} holds no {which!r} that was set aside; `titan-ckpt ls` lists them")
        return which
    name = directory_name(which)
    if storage.has(name):
        return name
    found = [name for name in aside if step_of_aside(name) == which]
    if not found:
        raise CheckpointError(f"{storage.url} holds no checkpoint of step {which}; `titan-ckpt ls` lists them")
    if len(found) > 1:
        raise CheckpointError(f"several checkpoints of step {which} were set aside: give the name of one, {found}")
    return found[0]


def _moves_to(storage: Storage, name: str, head: Head) -> dict[str, str]:
    """Return the renames after which the directory holds the line of `head`; those that set aside come first."""
    away, back = {}, {}
    for other in step_names(storage):
        manifest = _manifest(storage, other)
        on_line = is_on_line(manifest, head) if manifest is not None and head.branches else True
        if other != name and ((step_of(other) or 0) >= head.step or not on_line):
            away[other] = _aside_name(other)
    taken = {step_of(other) for other in step_names(storage) if other not in away}
    for other in [name, *aside_names(storage)]:
        step = step_of_aside(other)
        if step is None or step in taken:
            continue
        manifest = _manifest(storage, other)
        if manifest is not None and (other == name or is_on_line(manifest, head)):
            back[other] = directory_name(step)
            taken.add(step)
    return {**away, **back}


def _move(storage: Storage, moves: Mapping[str, str], latest: str | None) -> None:
    """Rename checkpoints in one act; `latest` is then the name that the pointer holds."""
    plan = {"moves": list(moves.items()), "latest": latest}
    storage.replace(MOVES, json.dumps(plan).encode())
    _carry_out(storage, list(moves.items()), latest)


def _carry_out(storage: Storage, moves: Sequence[tuple[str, str]], latest: str | None) -> None:
    for old, new in moves:
        if not storage.has(new):
            storage.rename(old, new)
    renamed = dict(moves)
    for pin, name in pins_in(storage).items():
        if name in renamed:
            storage.replace(f"{PINS}/{pin}", f"{renamed[name]}\n".encode())
    if latest is not None:
        point_at(storage, latest)
    storage.delete(MOVES)


def _manifest(storage: Storage, name: str) -> Manifest | None:
    try:
        return read_manifest(storage, name)
    except CheckpointError:
        return None


def _aside_name(name: str) -> str:
    return f".aside-{name}-{secrets.token_hex(4)}"
