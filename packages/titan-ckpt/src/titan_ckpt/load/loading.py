"""One load: from a folder to the newest sound checkpoint, and from there into the caller's objects."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.index import Content, read_content, read_state
from titan_ckpt.format.json_values import parts_of
from titan_ckpt.format.manifest import Manifest, folder_name, read_manifest
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.load.reads import Reads, Wanted, carry_out, plan_reads
from titan_ckpt.load.selection import Comparison, Selection, compare, describe, overlaid, value_names
from titan_ckpt.manage.listing import CheckpointInfo, info_of, step_names
from titan_ckpt.manage.size_check import wrong_sizes
from titan_ckpt.state.shards import Layouts
from titan_ckpt.state.tree import Stateful, merge, split
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.direct_io import machine

OnDamage = Literal["previous", "raise"]

ABSENT = "it does not exist"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded(CheckpointInfo):
    """What was loaded.

    Attributes:
        missing: selected names that the checkpoint does not hold; they keep their values. Empty when strict.
        unexpected: selected names that the state does not have. Empty when strict.
        passed_over: newer checkpoints that are damaged, by folder name, each with what is wrong with it.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    passed_over: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """How to load.

    Attributes:
        step: which step; None for the newest sound one.
        required: whether it is an error when there is no checkpoint at all.
        on_damage: what to do when no step was asked for and the newest is damaged.
        selection: which parts of the state.
        strict: whether names that are missing or unexpected are an error.
        cast: whether another type will do.
    """

    step: int | None
    required: bool
    on_damage: OnDamage
    selection: Selection
    strict: bool
    cast: bool


class _DamagedError(Exception):
    """A checkpoint turned out to be damaged; the same on all ranks."""

    def __init__(self, problems: Sequence[str], *, touched: bool) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)
        self.touched = touched


def load(ranks: Ranks, storage: Storage, state: Mapping[str, Stateful], request: Request) -> Loaded | None:
    """Load a checkpoint into `state`; collective.

    Args:
        ranks: who takes part.
        storage: where the checkpoints are.
        state: what to fill, by top-level name.
        request: how.

    Returns:
        What was loaded; None when no step was asked for, none is required and there is no checkpoint at all.

    Raises:
        CheckpointError: see `Checkpointer.load`.
    """
    names, strangers = ranks.on_first(f"list {storage.url}", lambda: _candidates(storage))
    if request.step is not None:
        asked = folder_name(request.step)
        try:
            return _load_one(ranks, storage, asked, state, request, {})
        except _DamagedError as damage:
            held = f"The folder holds {', '.join(names[::-1])}. " if names else "The folder holds no checkpoint. "
            raise CheckpointError(
                f"{storage.url}/{asked} cannot be loaded: {damage}. {_mixture(damage)}{held}"
                "Give no step to load the newest sound checkpoint"
            ) from None
    passed_over: dict[str, list[str]] = {}
    touched = ""
    for name in names:
        try:
            return _load_one(ranks, storage, name, state, request, passed_over)
        except _DamagedError as damage:
            if damage.problems == [ABSENT]:  # on an object store: the rest of a save that was killed
                continue
            passed_over[name] = damage.problems
            touched = touched or _mixture(damage)
            if request.on_damage == "raise":
                raise CheckpointError(
                    f"{storage.url}/{name} is damaged: {damage}. {_mixture(damage)}Restore it, ask for another step, "
                    'or let on_damage be "previous"'
                ) from None
            if ranks.rank == 0:
                logger.warning("%s/%s is damaged and passed over: %s", storage.url, name, damage)
    damaged = list(passed_over)
    if damaged or strangers:
        told = "".join(f"{name}: {', '.join(problems)}. " for name, problems in list(passed_over.items())[:3])
        raise CheckpointError(
            f"{storage.url} holds no sound checkpoint, but {', '.join(damaged + strangers)}. {touched}{told}"
            "Restore them, or give another folder to start afresh"
        )
    if request.required:
        raise CheckpointError(
            f"there is no checkpoint in {storage.url} to go on from: give the right folder, or start afresh"
        )
    return None


def _mixture(damage: _DamagedError) -> str:
    return (
        "Parts of the state were filled before the damage was met: it is a mixture now, do not use it. "
        if damage.touched
        else ""
    )


def _candidates(storage: Storage) -> tuple[list[str], list[str]]:
    """Return what may be checkpoints, newest first, and what is called like one but is none."""
    names = step_names(storage)[::-1]
    known = set(names)
    return names, sorted(name for name in storage.names() if name.startswith("step-") and name not in known)


def _load_one(
    ranks: Ranks,
    storage: Storage,
    name: str,
    state: Mapping[str, Stateful],
    request: Request,
    passed_over: Mapping[str, Sequence[str]],
) -> Loaded:
    parsed: list[Content] = []  # by rank 0, as it looked; the others get the text
    seen = ranks.on_first(f"look at {storage.url}/{name}", lambda: _looked_at(storage, name, parsed))
    if isinstance(seen, list):
        raise _DamagedError(seen, touched=False)
    manifest, text = seen
    content, (tensors, values) = ranks.together(
        f"read the index of {name} and collect the state to load into",
        lambda: (parsed[0] if parsed else read_content(text, manifest), split(state)),
    )
    takes = request.selection.takes
    wanted = describe(ranks, tensors)

    def judge() -> Comparison:
        if not request.selection.is_all:
            asked = {key for description in wanted for key in description}
            request.selection.refuse_idle_patterns(
                [*asked, *content.tensors, *value_names(values), *value_names(content.values)]
            )
        judged = compare(list(state), wanted, content.values, content.tensors, takes, cast=request.cast)
        if told := judged.told(strict=request.strict):
            raise CheckpointError(told)
        return judged

    judged = ranks.on_first(f"load {storage.url}/{name}", judge)
    chosen = {key: tensor for key, tensor in tensors.items() if takes(key) and key in content.tensors}
    with TensorFiles(storage, name, manifest) as files:
        damages = _fill(ranks, files, content, chosen, takes)
    if any(damages):
        problems = list(dict.fromkeys(told for part in damages for told in part))
        raise _DamagedError(problems, touched=bool(chosen))
    entries = _entries_touched(state, content, request.selection)

    def hand_over() -> None:
        for entry in entries:
            stored, present = content.values.get(entry, {}), values.get(entry, {})
            if not (request.selection.is_all and request.strict):
                stored = overlaid(present, stored, entry, takes, strict=request.strict)
            state[entry].load_state_dict(merge(entry, {entry: stored}, tensors))

    ranks.together(f"load the state of {name}", hand_over)
    info = info_of(storage, name, manifest)
    return Loaded(
        info.step, info.path, info.metadata, info.manifest, judged.missing, judged.unexpected, dict(passed_over)
    )


def _looked_at(storage: Storage, name: str, parsed: list[Content]) -> tuple[Manifest, bytes] | list[str]:
    """Look at all but the tensors: what a damaged checkpoint is usually known by, before anything is touched."""
    try:
        if not storage.has(name):
            return [ABSENT]
        manifest = read_manifest(storage, name)
        problems = wrong_sizes(storage, name, manifest)
        if problems:
            return problems
        text = read_state(storage, name, manifest)
        parsed.append(read_content(text, manifest))
    except CheckpointError as error:
        return [str(error)]
    return manifest, text


def _fill(
    ranks: Ranks, files: TensorFiles, content: Content, tensors: Mapping[str, Any], takes: Callable[[str], bool]
) -> list[list[str]]:
    """Fill tensors; collective. Returns what is damaged, by rank."""
    planned: list[Reads] = []

    def plan() -> tuple[str, int]:
        layouts = Layouts()
        wanted = (
            Wanted(key, content.tensors[key], part.box, held)
            for key, tensor in tensors.items()
            for part, held in layouts.parts_of(key, tensor)
        )
        planned.append(plan_reads(files, content.piece_bytes, wanted))
        return machine(), planned[0].nbytes

    shares = ranks.share(f"find the tensors of {files.name}", plan)
    # Where ranks of one machine want the same bytes, which replicas do, its disk is to be read once for all of them.
    asked_here = sum(nbytes for where, nbytes in shares if where == machine())
    once = asked_here < 2 * sum(spec.nbytes for key, spec in content.tensors.items() if takes(key))
    return ranks.share(f"read the tensors of {files.name}", lambda: carry_out(files, planned[0], once=once))


def _entries_touched(state: Mapping[str, Stateful], content: Content, selection: Selection) -> list[str]:
    """Return the entries of which anything is loaded; the same on all ranks, whichever tensors each of them has."""
    names = [*content.tensors, *value_names(content.values)]
    touched = {parts_of(name)[0] for name in names if selection.takes(name)}
    if selection.is_all:
        touched |= content.values.keys()
    return [entry for entry in state if entry in touched]
