"""One load, as all ranks do it together: choose a checkpoint, check it, compare it, fill the tensors.

Called by `Checkpointer.load`. The steps: list the directory (rank 0); for the newest checkpoint, or the one asked for:
check manifest, sizes and index (rank 0), compare names, shapes and dtypes with the state (rank 0), read this rank's
shards with checksums (all ranks), call `load_state_dict` (all ranks). A checkpoint that turns out to be corrupt is
skipped on all ranks, and the one before it is tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.index import Content, read_content, read_state
from titan_ckpt.format.json_values import path_of
from titan_ckpt.format.manifest import Manifest, directory_name, read_manifest, step_of
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.load.reads import Reads, Wanted, execute_reads, plan_reads
from titan_ckpt.load.selection import Comparison, Description, Selection, compare, describe, overlay, value_names
from titan_ckpt.manage.listing import CheckpointInfo, aside_names, info_of, step_names, step_of_aside
from titan_ckpt.manage.size_check import size_problems
from titan_ckpt.messages import get_logger
from titan_ckpt.state.shards import ShardLayouts
from titan_ckpt.state.tree import Stateful, merge, split
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.direct_io import machine_id

OnCorruption = Literal["previous", "raise"]

ABSENT = "it does not exist"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Loaded(CheckpointInfo):
    """The checkpoint that was loaded.

    Attributes:
        missing: Selected names that the checkpoint does not hold; they keep their values. Empty if strict.
        unexpected: Selected names that the state does not have. Empty if strict.
        skipped: Newer checkpoints that are corrupt, by directory name, each with its problems.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to load and how; see `Checkpointer.load`.

    Attributes:
        step: The step; None for the newest valid one.
        required: Whether it is an error if there is no checkpoint at all.
        on_corruption: What to do if no step was asked for and the newest checkpoint is corrupt.
        selection: Which names to load.
        strict: Whether missing or unexpected names are an error.
        cast: Whether dtypes may differ.
    """

    step: int | None
    required: bool
    on_corruption: OnCorruption
    selection: Selection
    strict: bool
    cast: bool


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint whose manifest, sizes and index were checked.

    Attributes:
        name: Its directory name.
        manifest: Its manifest.
        content: Its index.
    """

    name: str
    manifest: Manifest
    content: Content


class _CorruptCheckpointError(Exception):
    """A checkpoint turned out to be corrupt; raised alike on all ranks.

    Attributes:
        problems: What is wrong with it.
        touched: Whether tensors of the state may have been overwritten.
    """

    def __init__(self, problems: Sequence[str], *, touched: bool) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)
        self.touched = touched

    @property
    def warning(self) -> str:
        """What the error means for the state."""
        if not self.touched:
            return ""
        return "The state was partially overwritten before corruption was detected; discard it. "


def load(ranks: Ranks, storage: Storage, state: Mapping[str, Stateful], request: Request) -> Loaded | None:
    """Load a checkpoint into `state`; collective.

    Args:
        ranks: The participating ranks.
        storage: The directory of checkpoints.
        state: The objects to fill, by top-level name.
        request: What to load and how.

    Returns:
        What was loaded; None if no step was asked for, none is required and there is no checkpoint at all.

    Raises:
        CheckpointError: See `Checkpointer.load`.
    """
    names, invalid, aside = ranks.run_on_rank_0(f"list {storage.url}", lambda: _candidate_names(storage))
    if request.step is not None:
        asked = directory_name(request.step)
        try:
            return _load_one(ranks, storage, asked, state, request)
        except _CorruptCheckpointError as error:
            held = f"The directory holds {', '.join(names[::-1])}" if names else "The directory holds no checkpoint"
            if asked_aside := [name for name in aside if step_of_aside(name) == request.step]:
                held = f"It was set aside as {', '.join(asked_aside)}: `titan-ckpt restore` brings it back. {held}"
            raise CheckpointError(
                f"{storage.url}/{asked} cannot be loaded: {error}. {error.warning}{held}; "
                "give no step to load the newest valid checkpoint"
            ) from None
    skipped: dict[str, list[str]] = {}
    warning = ""
    for name in names:
        try:
            return replace(_load_one(ranks, storage, name, state, request), skipped=skipped)
        except _CorruptCheckpointError as error:
            if error.problems == [ABSENT]:  # on an object store: what a killed save left
                continue
            skipped[name] = error.problems
            warning = warning or error.warning
            if request.on_corruption == "raise":
                raise CheckpointError(
                    f"{storage.url}/{name} is corrupt: {error}. {error.warning}Restore it, ask for another step, "
                    'or set on_corruption="previous"'
                ) from None
            if ranks.rank == 0:
                logger.warning("%s/%s is corrupt, skipped: %s", storage.url, name, error)
    if skipped or invalid:
        problems = "".join(f"{name}: {', '.join(listed)}. " for name, listed in list(skipped.items())[:3])
        raise CheckpointError(
            f"{storage.url} holds no valid checkpoint, only {', '.join([*skipped, *invalid])}. {warning}{problems}"
            "Restore them, or give another directory to start from scratch"
        )
    if request.required:
        raise CheckpointError(
            f"there is no checkpoint in {storage.url} to resume from: give the right directory, or start from scratch"
        )
    return None


def _candidate_names(storage: Storage) -> tuple[list[str], list[str], list[str]]:
    """Return the names of possible checkpoints, newest first; names that look like one but are not; and those aside."""
    names = step_names(storage)[::-1]
    invalid = sorted(name for name in storage.names() if name.startswith("step-") and step_of(name) is None)
    return names, invalid, aside_names(storage)


def _load_one(ranks: Ranks, storage: Storage, name: str, state: Mapping[str, Stateful], request: Request) -> Loaded:
    """Load one checkpoint; collective.

    Raises:
        _CorruptCheckpointError: On all ranks, if it is absent or corrupt.
        CheckpointError: On all ranks, if it does not match the state.
    """
    checked = ranks.run_on_rank_0(f"check {storage.url}/{name}", lambda: _check(storage, name))
    if isinstance(checked, list):
        raise _CorruptCheckpointError(checked, touched=False)
    content, selection = checked.content, request.selection
    tensors, values = ranks.run_on_all("collect the state to load into", lambda: split(state))
    wanted = describe(ranks, tensors)
    differences = ranks.run_on_rank_0(
        f"load {storage.url}/{name}", lambda: _compare(list(state), wanted, values, content, request)
    )
    chosen = {key: tensor for key, tensor in tensors.items() if selection.includes(key) and key in content.tensors}
    problems = _fill(ranks, storage, checked, chosen, selection)
    if problems:
        raise _CorruptCheckpointError(problems, touched=bool(chosen))
    entries = _entries_touched(state, content, selection)

    def hand_over() -> None:
        for entry in entries:
            stored, present = content.values.get(entry, {}), values.get(entry, {})
            if not (selection.is_all and request.strict):
                stored = overlay(present, stored, entry, selection.includes, strict=request.strict)
            state[entry].load_state_dict(merge(entry, {entry: stored}, tensors))

    ranks.run_on_all(f"load the state of {name}", hand_over)
    info = info_of(storage, name, checked.manifest)
    return Loaded(info.step, info.path, info.metadata, info.manifest, differences.missing, differences.unexpected)


def _check(storage: Storage, name: str) -> _Candidate | list[str]:
    """Check everything but the tensor data, which finds most corruption before the state is touched; rank 0 only.

    Returns:
        The checkpoint, or its problems.
    """
    try:
        if not storage.has(name):
            return [ABSENT]
        manifest = read_manifest(storage, name)
        problems = size_problems(storage, name, manifest)
        if problems:
            return problems
        return _Candidate(name, manifest, read_content(read_state(storage, name, manifest), manifest))
    except CheckpointError as error:
        return [str(error)]


def _compare(
    entries: Sequence[str],
    wanted: Sequence[Description],
    values: Mapping[str, Any],
    content: Content,
    request: Request,
) -> Comparison:
    """Compare the state with the checkpoint; rank 0 only.

    Raises:
        CheckpointError: If they do not match; the message lists all differences.
    """
    selection = request.selection
    if not selection.is_all:
        asked = {key for description in wanted for key in description}
        selection.check_patterns([*asked, *content.tensors, *value_names(values), *value_names(content.values)])
    differences = compare(entries, wanted, content, selection, cast=request.cast)
    if problem := differences.problem(strict=request.strict):
        raise CheckpointError(problem)
    return differences


def _fill(
    ranks: Ranks, storage: Storage, checked: _Candidate, tensors: Mapping[str, torch.Tensor], selection: Selection
) -> list[str]:
    """Fill this rank's shards of tensors; collective. Returns the corruption that any rank found."""
    content = checked.content
    with TensorFiles(storage, checked.name, checked.manifest) as files:

        def plan() -> tuple[Reads, tuple[str, int]]:
            layouts = ShardLayouts()
            wanted = (
                Wanted(key, content.tensors[key], part.box, held)
                for key, tensor in tensors.items()
                for part, held in layouts.local_parts(key, tensor)
            )
            reads = plan_reads(files, content.piece_bytes, wanted)
            return reads, (machine_id(), reads.nbytes)

        reads, shares = ranks.run_and_share(f"find the tensors of {checked.name}", plan)
        # Replicas want the same bytes. Then ranks of one machine share its page cache, so that the disk is read once.
        here = sum(nbytes for machine, nbytes in shares if machine == machine_id())
        selected = sum(spec.nbytes for key, spec in content.tensors.items() if selection.includes(key))
        found = ranks.gather_from_all(
            f"read the tensors of {checked.name}",
            lambda: execute_reads(files, reads, bypass_cache=here < 2 * selected),
        )
    return list(dict.fromkeys(problem for of_rank in found for problem in of_rank))


def _entries_touched(state: Mapping[str, Stateful], content: Content, selection: Selection) -> list[str]:
    """Return the entries of which anything is loaded; the same on all ranks, whatever tensors each of them has."""
    names = [*content.tensors, *value_names(content.values)]
    touched = {path_of(name)[0] for name in names if selection.includes(name)}
    if selection.is_all:
        touched |= content.values.keys()
    return [entry for entry in state if entry in touched]
