"""Which checkpoints to keep, decided from storage alone, so that it survives restarts. Deciding deletes nothing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import Manifest, read_manifest, step_of
from titan_ckpt.manage.listing import latest_in, pins_in, step_names
from titan_ckpt.manage.size_check import wrong_sizes
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage


@dataclass(frozen=True)
class KeepBest:
    """Keep the checkpoints that are best by a number given at save.

    Attributes:
        metric: its name in `save(..., metrics={...})`.
        mode: whether the smallest or the largest is best.
        count: how many to keep.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1


@dataclass(frozen=True)
class Retention:
    """What to keep; a checkpoint is kept when any of these says so, and all are when none is given.

    Attributes:
        keep_last: the newest so many.
        keep_every: those whose step is a multiple of this, for good.
        keep_best: the best so many by a number.
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
        keep: the checkpoints that stay, by folder name, each with the reasons.
        remove: the checkpoints that go, by folder name, oldest first, each with its size in bytes.
    """

    keep: Mapping[str, list[str]] = field(default_factory=dict)
    remove: Mapping[str, int] = field(default_factory=dict)


def plan_prune(folder: str | Path | Storage, policy: Retention, newest: int | None = None) -> PrunePlan:
    """Decide what to remove; nothing is deleted.

    What is damaged on its face (files missing or cut short) is neither counted as kept nor removed: it is evidence.
    Folders without a manifest that reads are never touched. The newest sound one always stays.

    Args:
        folder: where the checkpoints are.
        policy: what to keep.
        newest: count from this step backwards and leave newer ones alone (a run went back to before them); None for
            the newest there is.

    Returns:
        What stays, and why, and what goes.
    """
    storage = open_storage(str(folder)) if isinstance(folder, str | Path) else folder
    if policy.keeps_all:
        return PrunePlan({name: ["all are kept"] for name in step_names(storage)})
    found = _Found(storage)
    reasons: dict[str, list[str]] = {}
    considered = []
    for name, step in found.steps.items():
        if newest is not None and step > newest:
            reasons[name] = [f"is newer than step {newest}"]
        else:
            considered.append(name)
    for name in found.sound(considered, policy.keep_last or 1):
        told = f"is among the last {policy.keep_last}" if policy.keep_last else "is the newest sound one"
        reasons.setdefault(name, []).append(told)
    for name in considered:
        if policy.keep_every is not None and found.steps[name] % policy.keep_every == 0:
            reasons.setdefault(name, []).append(f"is of a step that {policy.keep_every} divides")
    if policy.keep_best is not None:
        for name in _best(found, policy.keep_best):
            reasons.setdefault(name, []).append(f"is best by {policy.keep_best.metric}")
    for pinned, name in pins_in(storage).items():
        reasons.setdefault(name, []).append(f"is pinned as {pinned!r}")
    if (latest := latest_in(storage)) is not None:
        reasons.setdefault(latest, []).append("is what `latest` points to")
    remove: dict[str, int] = {}
    for name in reversed(considered):
        if name in reasons or (manifest := found.manifest(name)) is None:
            continue
        if found.sound([name], 1):
            remove[name] = manifest.nbytes
        else:
            reasons[name] = ["is damaged"]
    return PrunePlan({name: reasons[name] for name in reversed(found.steps) if name in reasons}, remove)


def prune(storage: Storage, plan: PrunePlan) -> None:
    """Remove what a plan says, each checkpoint's validity before its files.

    Args:
        storage: where the checkpoints are.
        plan: what `plan_prune` decided.
    """
    for name in plan.remove:
        storage.remove(name)


class _Found:
    """What there is. No more manifests are read than the question needs: a run that keeps a thousand checkpoints for
    good does not read them all after each save.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._manifests: dict[str, Manifest | None] = {}
        # Newest first.
        self.steps = {name: step for name in reversed(step_names(storage)) if (step := step_of(name)) is not None}

    def manifest(self, name: str) -> Manifest | None:
        """Return a checkpoint's manifest, or None where there is none that reads."""
        if name not in self._manifests:
            try:
                self._manifests[name] = read_manifest(self._storage, name)
            except CheckpointError:
                self._manifests[name] = None
        return self._manifests[name]

    def sound(self, names: Iterable[str], count: int) -> list[str]:
        """Return the first so many of which all files are there, as long as they should be."""
        found: list[str] = []
        for name in names:
            if len(found) == count:
                break
            manifest = self.manifest(name)
            if manifest is not None and not wrong_sizes(self._storage, name, manifest):
                found.append(name)
        return found


def _best(found: _Found, policy: KeepBest) -> list[str]:
    told = {name: manifest.metrics.get(policy.metric) for name in found.steps if (manifest := found.manifest(name))}
    # NaN compares with nothing, so it would come out best or worst by chance.
    known = {name: value for name, value in told.items() if value is not None and not math.isnan(value)}
    sign = 1 if policy.mode == "min" else -1
    return found.sound(sorted(known, key=lambda name: sign * known[name]), policy.count)
