"""A loader's saved state: its form, and the reasons to refuse one."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from titan_data.batching.documents import Cursor
from titan_data.batching.global_batches import Position, Standing, Tally
from titan_data.batching.mixing import Phase
from titan_data.batching.packing import Packing, Place
from titan_data.errors import ChangedDataError, DataError
from titan_data.fingerprint import Fingerprint, list_differences

STATE_VERSION = 1

Change = Literal["data", "mixture", "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing"]
"""What may differ from the saved run, if the user says so; see `Loader.load_state_dict`."""


@dataclass(frozen=True)
class Settings:
    """Everything that the order of the tokens depends on.

    Attributes:
        seed: of the shuffling.
        shuffle: whether random-access sources are shuffled.
        tokenizer: its fingerprint; None without one.
        global_batch_size: G.
        packing: how documents become rows.
        phases: weights, in the order of `fingerprints`, and S, by step.
        fingerprints: of the sources, by name.
        max_epochs: of the sources, by name.
    """

    seed: int
    shuffle: bool
    tokenizer: str | None
    global_batch_size: int
    packing: Packing
    phases: Sequence[Phase]
    fingerprints: Mapping[str, Fingerprint]
    max_epochs: Mapping[str, int | None]


def dump_state(position: Position, settings: Settings) -> dict[str, Any]:
    """Write down where a loader stands.

    Args:
        position: where that is.
        settings: of the loader.

    Returns:
        Plain JSON; equal for equal arguments.
    """
    names = list(settings.fingerprints)
    state: dict[str, Any] = {
        "version": STATE_VERSION,
        "step": position.step,
        "phase": position.phase,
        "settings": {
            "seed": settings.seed,
            "shuffle": settings.shuffle,
            "tokenizer": settings.tokenizer,
            "global_batch_size": settings.global_batch_size,
            "packing": _dump_packing(settings.packing),
        },
        "phases": [_dump_phase(phase, names) for phase in settings.phases],
        "sources": {
            name: {
                "cursor": list(standing.place.cursor),
                "offset": standing.place.offset,
                "window": [list(rows) for rows in standing.place.window],
                "tally": standing.tally._asdict(),
                "share": standing.share,
                "ended": standing.ended,
                "max_epochs": settings.max_epochs[name],
                "fingerprint": settings.fingerprints[name].to_json(),
            }
            for name, standing in zip(names, position.sources, strict=True)
        },
    }
    return {**state, "checksum": _checksum(state)}


@dataclass(frozen=True)
class Resume:
    """What a saved state means for a loader with certain settings.

    Attributes:
        position: where to go on.
        lenient: numbers of the sources whose documents, or their order, are others than when the state was saved.
    """

    position: Position
    lenient: frozenset[int]


def read_state(
    state: Mapping[str, Any], settings: Settings, starts: Mapping[str, Cursor], allow_changes: Collection[str]
) -> Resume:
    """Make sure that a loader with these settings can go on from a saved state.

    Args:
        state: what was saved.
        settings: those of the loader that is to go on.
        starts: by name, where each source begins: for those that are new.
        allow_changes: what may differ.

    Returns:
        Where to go on.

    Raises:
        ChangedDataError: a difference that is not allowed (all of them are listed).
        DataError: another form, or a damaged state.
    """
    if unknown := sorted(set(allow_changes) - set(get_args(Change))):
        raise DataError(f"allow_changes knows {', '.join(get_args(Change))}, not {', '.join(unknown)}")
    version = state.get("version")
    if version != STATE_VERSION:
        raise DataError(f"this is loader state version {version!r}, but this titan-data reads version {STATE_VERSION}")
    if state.get("checksum") != _checksum({key: value for key, value in state.items() if key != "checksum"}):
        raise DataError("the loader state is damaged: it does not fit its checksum")
    differences = _differences(state, settings)
    changes = {change for change, _ in differences}
    if refused := sorted(changes - set(allow_changes)):
        lines = "\n".join(f"  {line}" for change, line in differences if change in refused)
        raise ChangedDataError(
            f"the order of the data would not be that of the saved run, because these differ:\n{lines}\n"
            "Resume with what was saved, or start a new run in a new folder. To go on from the saved place anyhow, "
            f"allow it: allow_changes={{{', '.join(map(repr, refused))}}}",
            refused,
        )
    return _resume(state, settings, starts, changes)


def _resume(
    state: Mapping[str, Any], settings: Settings, starts: Mapping[str, Cursor], changes: Collection[str]
) -> Resume:
    reordered = not {"tokenizer", "seed", "shuffle", "packing"}.isdisjoint(changes)
    standings, lenient = [], set()
    for number, (name, fingerprint) in enumerate(settings.fingerprints.items()):
        saved = state["sources"].get(name)
        if saved is None:
            standings.append(Standing(Place(starts[name])))
            continue
        if reordered or fingerprint.digest != saved["fingerprint"]["digest"]:
            lenient.add(number)
        limit = settings.max_epochs[name]
        standings.append(
            Standing(
                Place(tuple(saved["cursor"]), saved["offset"], tuple((s, rows) for s, rows in saved["window"])),
                Tally(**saved["tally"]),
                0 if "mixture" in changes else saved["share"],
                saved["ended"] and limit is not None and saved["cursor"][0] >= limit,
            )
        )
    return Resume(Position(state["step"], state["phase"], tuple(standings)), frozenset(lenient))


def _differences(state: Mapping[str, Any], settings: Settings) -> list[tuple[str, str]]:
    """List `(change, line for people)` for all that would have made the batches up to now others than they were."""
    found: list[tuple[str, str]] = []
    saved = state["settings"]
    for change in ("tokenizer", "seed", "shuffle", "global_batch_size"):
        now = getattr(settings, change)
        if saved[change] != now:
            found.append((change, f"{change}: saved {saved[change]!r}, now {now!r}"))
    packing = _dump_packing(settings.packing)
    for key in sorted({*saved["packing"], *packing}):
        if (then := saved["packing"].get(key)) != (now := packing.get(key)):
            found.append(("packing", f"packing.{key}: saved {then!r}, now {now!r}"))
    for name, fingerprint in settings.fingerprints.items():
        if (source := state["sources"].get(name)) is not None:
            lines = list_differences(Fingerprint.from_json(source["fingerprint"]), fingerprint)
            found += [("data", f"data of source {name!r}: {line}") for line in lines]
            now = settings.max_epochs[name]
            if source["max_epochs"] != now and (source["ended"] or (now is not None and source["cursor"][0] >= now)):
                found.append(("mixture", f"max_epochs of {name!r}: saved {source['max_epochs']}, now {now}"))
    return found + _phase_differences(state, settings)


def _phase_differences(state: Mapping[str, Any], settings: Settings) -> list[tuple[str, str]]:
    """Compare the phases that have begun: what comes later may be changed at will."""
    step = max(state["step"], 1)
    names = list(settings.fingerprints)
    then = [phase for phase in state["phases"] if phase["from_step"] < step]
    today = [_dump_phase(phase, names) for phase in settings.phases if phase.from_step < step]
    found = []
    for change, key in (("mixture", "weights"), ("seq_len", "seq_len")):
        before, now = _switches(then, key), _switches(today, key)
        for begin in sorted({*before, *now}):
            if before.get(begin) != now.get(begin):
                label = key if begin == 0 else f"{key} from step {begin}"
                found.append((change, f"{label}: saved {before.get(begin)!r}, now {now.get(begin)!r}"))
    return found


def _switches(phases: Sequence[Mapping[str, Any]], key: str) -> dict[int, Any]:
    """Give the values of a key by the steps at which it took them."""
    switches: dict[int, Any] = {}
    last = None
    for phase in phases:
        if phase[key] != last:
            switches[phase["from_step"]] = last = phase[key]
    return switches


def _dump_phase(phase: Phase, names: Sequence[str]) -> dict[str, Any]:
    # Sources without weight do not matter.
    weights = {name: weight for name, weight in zip(names, phase.weights, strict=True) if weight > 0}
    return {"from_step": phase.from_step, "weights": weights, "seq_len": phase.seq_len}


def _dump_packing(packing: Packing) -> dict[str, Any]:
    """Write down what matters for this kind of packing."""
    unused = {"concat": {"long_documents", "look_ahead"}, "one_per_row": {"look_ahead"}, "best_fit": set[str]()}
    return {key: value for key, value in asdict(packing).items() if key not in unused[packing.kind]}


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()[:16]
