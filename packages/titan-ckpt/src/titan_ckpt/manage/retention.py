"""Retention: which checkpoints to keep, decided from storage alone, so that it survives restarts.

`plan_prune` decides and deletes nothing; `prune` deletes what a plan says. Called after each save and by
`titan-ckpt prune`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.manifest import Manifest, read_manifest, step_of
from titan_ckpt.manage.listing import aside_names, latest_in, pins_in, step_names
from titan_ckpt.manage.size_check import size_problems
from titan_ckpt.storage.base import Storage, attempt_each
from titan_ckpt.storage.open import open_storage


@dataclass(frozen=True)
class KeepBest:
    """Keep the checkpoints that are best by a metric.

    Attributes:
        metric: Its name in `save(..., metrics={...})`.
        mode: Whether the smallest or the largest value is best.
        count: How many checkpoints to keep.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1


@dataclass(frozen=True)
class Retention:
    """What to keep. A checkpoint is kept if any rule applies to it; without rules, all are kept.

    Attributes:
        keep_last: The number of newest checkpoints to keep.
        keep_every: Keep each checkpoint whose step is a multiple of this, permanently.
        keep_best: Keep the best checkpoints by a metric.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise CheckpointError(f"keep_last must be at least 1 or None (keep all), not {self.keep_last}")
        if self.keep_every is not None and self.keep_every < 1:
            raise CheckpointError(f"keep_every must be at least 1 step or None, not {self.keep_every}")
        if self.keep_best is not None and (self.keep_best.count < 1 or self.keep_best.mode not in ("min", "max")):
            raise CheckpointError(
                f'keep_best needs a count of at least 1 and the mode "min" or "max", not {self.keep_best}'
            )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.keep_last is None and self.keep_best is None


@dataclass(frozen=True)
class PrunePlan:
    """What pruning would do.

    Attributes:
        keep: The checkpoints that stay, by directory name, each with the reasons.
        remove: The checkpoints to remove, by directory name, oldest first, each with its size in bytes.
    """

    keep: Mapping[str, list[str]] = field(default_factory=dict)
    remove: Mapping[str, int] = field(default_factory=dict)


def plan_prune(directory: str | Path | Storage, policy: Retention) -> PrunePlan:
    """Decide what to remove; nothing is deleted.

    Checkpoints with missing or truncated files are neither counted nor deleted, so that they can be inspected.
    Directories without a readable manifest are never touched. The newest valid checkpoint, the one `latest` points to
    and pinned ones always stay.

    Args:
        directory: The directory of checkpoints.
        policy: What to keep.

    Returns:
        What stays and why, and what would be removed.

    Raises:
        CheckpointError: If the directory, or a pin in it, cannot be read.
    """
    storage = open_storage(str(directory)) if isinstance(directory, str | Path) else directory
    with system_errors(f"plan what to remove in {storage.url}"):
        return _plan(storage, policy)


def _plan(storage: Storage, policy: Retention) -> PrunePlan:
    if policy.keeps_all:
        return PrunePlan({name: ["all are kept"] for name in step_names(storage)})
    found = _Found(storage)
    reasons = _reasons_to_keep(storage, found, policy)
    remove: dict[str, int] = {}
    for name in reversed(found.steps):
        if name in reasons or (manifest := found.manifest(name)) is None:
            continue
        if found.valid([name], 1):
            remove[name] = manifest.nbytes
        else:
            reasons[name] = ["is corrupt"]
    return PrunePlan({name: reasons[name] for name in reversed(found.steps) if name in reasons}, remove)


def prune(storage: Storage, plan: PrunePlan) -> list[str]:
    """Remove what a plan says. Each checkpoint becomes invalid before its files are deleted.

    What cannot be removed is logged and left.

    Args:
        storage: The directory of checkpoints.
        plan: A plan made by `plan_prune`.

    Returns:
        The names of what was removed.
    """
    return attempt_each(plan.remove, storage.remove)


class _Found:
    """The checkpoints of a directory.

    Manifests are read only when needed: a run that keeps a thousand checkpoints permanently must not read all of them
    after each save.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._manifests: dict[str, Manifest | None] = {}
        # Newest first.
        self.steps = {name: step for name in reversed(step_names(storage)) if (step := step_of(name)) is not None}

    def manifest(self, name: str) -> Manifest | None:
        """Return a checkpoint's manifest, or None if it cannot be read."""
        if name not in self._manifests:
            try:
                self._manifests[name] = read_manifest(self._storage, name)
            except CheckpointError:
                self._manifests[name] = None
        return self._manifests[name]

    def valid(self, names: Iterable[str], count: int) -> list[str]:
        """Return the first `count` names whose files all exist with the right size."""
        found: list[str] = []
        for name in names:
            if len(found) == count:
                break
            manifest = self.manifest(name)
            if manifest is not None and not size_problems(self._storage, name, manifest):
                found.append(name)
        return found


def plan_clearing(storage: Storage) -> PrunePlan:
    """Decide which of the checkpoints that were set aside to remove: all that are not pinned; nothing is deleted.

    Args:
        storage: The directory of checkpoints.

    Returns:
        What stays and why, and what would be removed; the size of a corrupt one is given as 0.
    """
    with system_errors(f"read the pins of {storage.url}"):
        pinned = {name: pin for pin, name in pins_in(storage).items()}
    names, found = aside_names(storage), _Found(storage)
    sizes = {name: 0 if (manifest := found.manifest(name)) is None else manifest.nbytes for name in names}
    return PrunePlan(
        {name: [f"is pinned as {pinned[name]!r}"] for name in names if name in pinned},
        {name: size for name, size in sizes.items() if name not in pinned},
    )


def _reasons_to_keep(storage: Storage, found: _Found, policy: Retention) -> dict[str, list[str]]:
    """Apply each rule; return the checkpoints it keeps with the reason."""
    reasons: dict[str, list[str]] = {}
    last = f"is among the last {policy.keep_last}" if policy.keep_last else "is the newest valid one"
    for name in found.valid(found.steps, policy.keep_last or 1):
        reasons.setdefault(name, []).append(last)
    for name in found.steps:
        if policy.keep_every is not None and found.steps[name] % policy.keep_every == 0:
            reasons.setdefault(name, []).append(f"its step is a multiple of {policy.keep_every}")
    if policy.keep_best is not None:
        for name in _best(found, policy.keep_best):
            reasons.setdefault(name, []).append(f"is best by {policy.keep_best.metric}")
    for pinned, name in pins_in(storage).items():
        if name in found.steps:
            reasons.setdefault(name, []).append(f"is pinned as {pinned!r}")
    if (latest := latest_in(storage)) is not None:
        reasons.setdefault(latest, []).append("is what `latest` points to")
    return reasons


def _best(found: _Found, policy: KeepBest) -> list[str]:
    values = {name: manifest.metrics.get(policy.metric) for name in found.steps if (manifest := found.manifest(name))}
    # NaN compares false with everything, so its rank would be arbitrary.
    known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
    sign = 1 if policy.mode == "min" else -1
    return found.valid(sorted(known, key=lambda name: sign * known[name]), policy.count)
