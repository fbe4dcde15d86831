"""A loader's saved state as JSON: writing it, and checking that a loader can resume from it.

Called by `Loader.state_dict` and `Loader.load_state_dict`. Keys of the JSON belong to a state version and do not follow
renames in the code.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from titan_data.batching.documents import Cursor
from titan_data.batching.global_batches import Counts, ReaderState, SourceState
from titan_data.batching.mixing import ResolvedPhase
from titan_data.batching.packing import PackerState, Packing
from titan_data.errors import ChangedDataError, DataError
from titan_data.fingerprint import Fingerprint, list_differences

STATE_VERSION = 1

_PACKING_KEYS = {"packing_window": "look_ahead"}  # names in the JSON, where they differ from `Packing`

Change = Literal["data", "mixture", "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing"]
"""What may differ from the saved run if the user allows it; see `Loader.load_state_dict`."""


@dataclass(frozen=True)
class LoaderSettings:
    """Everything that the order of the tokens depends on.

    Attributes:
        seed: Seed of the shuffle.
        shuffle: Whether random-access sources are shuffled.
        tokenizer: The tokenizer's fingerprint; None without one.
        global_batch_size: G.
        packing: How documents become sequences.
        phases: Weights, in the order of `fingerprints`, and S, by step.
        fingerprints: The sources' fingerprints, by name.
        max_epochs: The sources' `max_epochs`, by name.
        identities: What the sources' orders depend on, by name; see `identity_of`.
        named: Names of the sources whose names somebody has chosen.
    """

    seed: int
    shuffle: bool
    tokenizer: str | None
    global_batch_size: int
    packing: Packing
    phases: Sequence[ResolvedPhase]
    fingerprints: Mapping[str, Fingerprint]
    max_epochs: Mapping[str, int | None]
    identities: Mapping[str, str]
    named: frozenset[str]


def dump_state(reader: ReaderState, settings: LoaderSettings) -> dict[str, Any]:
    """Serialize a loader's state.

    Args:
        reader: The state of its batch reader.
        settings: Its settings.

    Returns:
        JSON values; equal for equal arguments.
    """
    names = list(settings.fingerprints)
    state: dict[str, Any] = {
        "version": STATE_VERSION,
        "step": reader.step,
        "phase": reader.phase_start,
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
                "cursor": list(source.packer.cursor),
                "offset": source.packer.offset,
                "window": [list(used) for used in source.packer.window],
                "tally": source.counts._asdict(),
                "share": source.phase_tokens,
                "ended": source.ended,
                "max_epochs": settings.max_epochs[name],
                "fingerprint": settings.fingerprints[name].to_json(),
                # Left out where it is the name.
                **({} if settings.identities[name] == name else {"identity": settings.identities[name]}),
            }
            for name, source in zip(names, reader.sources, strict=True)
        },
    }
    return {**state, "checksum": _checksum(state)}


@dataclass(frozen=True)
class Resume:
    """Where a loader continues from a saved state.

    Attributes:
        reader: The state to continue from.
        lenient: Numbers of the sources whose documents, or their order, have changed since the state was saved.
    """

    reader: ReaderState
    lenient: frozenset[int]


def read_state(
    state: Mapping[str, Any], settings: LoaderSettings, starts: Mapping[str, Cursor], allow_changes: Collection[str]
) -> Resume:
    """Check that a loader with these settings can resume from a saved state.

    Args:
        state: The saved state.
        settings: Settings of the loader that resumes.
        starts: By name, the cursor at which each source begins; used for sources that are not in the state.
        allow_changes: What may differ.

    Returns:
        Where to continue.

    Raises:
        ChangedDataError: If anything differs that is not allowed; all differences are listed.
        DataError: If the state is of another version or corrupt, or `allow_changes` has an unknown entry.
    """
    check_state(state, allow_changes)
    differences = _differences(state, settings)
    changes = {change for change, _ in differences}
    if refused := sorted(changes - set(allow_changes)):
        lines = "\n".join(f"  {line}" for change, line in differences if change in refused)
        raise ChangedDataError(
            f"the order of the data would differ from that of the saved run, because of these changes:\n{lines}\n"
            "Resume with the saved settings, or start a new run in a new folder. To continue from the saved state "
            f"anyway, pass allow_changes={{{', '.join(map(repr, refused))}}}",
            refused,
        )
    return _resume(state, settings, starts, changes)


def check_state(state: Mapping[str, Any], allow_changes: Collection[str]) -> None:
    """Check that a state can be read.

    Raises:
        DataError: If it is of another version or corrupt, or `allow_changes` has an unknown entry.
    """
    if unknown := sorted(set(allow_changes) - set(get_args(Change))):
        raise DataError(
            f"allow_changes: unknown {', '.join(map(repr, unknown))}; choose from {', '.join(get_args(Change))}"
        )
    version = state.get("version")
    if version != STATE_VERSION:
        raise DataError(f"the loader state has version {version!r}, but this titan-data reads version {STATE_VERSION}")
    if state.get("checksum") != _checksum({key: value for key, value in state.items() if key != "checksum"}):
        raise DataError("the loader state is corrupt: its checksum does not match")


def match_sources(state: Mapping[str, Any], settings: LoaderSettings) -> dict[str, str]:
    """Match the sources of a loader with those of a saved state.

    Sources of one name are matched, and sources of equal contents if the name of one of them was only derived from a
    path: a copy of a folder is the same source.

    Returns:
        Saved names by the names of now; sources without a match are left out.
    """
    saved = {name: source["fingerprint"] for name, source in state["sources"].items()}
    chosen = {name for name, source in state["sources"].items() if source.get("identity", name) == name}
    found: dict[str, str] = {}

    def match(fits: Callable[[str, Fingerprint, str], bool]) -> None:
        for name, fingerprint in settings.fingerprints.items():
            if name not in found:
                taken = set(found.values())
                then = next(
                    (then for then in sorted(saved) if then not in taken and fits(name, fingerprint, then)), None
                )
                if then is not None:
                    found[name] = then

    def equal(fingerprint: Fingerprint, then: str) -> bool:
        # Without items, a fingerprint does not tell contents apart.
        return fingerprint.count > 0 and fingerprint.digest == saved[then]["digest"]

    match(lambda name, fingerprint, then: name == then and fingerprint.digest == saved[then]["digest"])
    match(lambda name, fingerprint, then: equal(fingerprint, then) and not (name in settings.named and then in chosen))
    match(lambda name, fingerprint, then: name == then)
    return found


def saved_identities(state: Mapping[str, Any], settings: LoaderSettings) -> dict[str, str]:
    """Return the identities to continue with: those of the saved state for the sources that it has."""
    matched = match_sources(state, settings)
    return {
        name: state["sources"][matched[name]].get("identity", matched[name]) if name in matched else identity
        for name, identity in settings.identities.items()
    }


def _resume(
    state: Mapping[str, Any], settings: LoaderSettings, starts: Mapping[str, Cursor], changes: Collection[str]
) -> Resume:
    reordered = not {"tokenizer", "seed", "shuffle", "packing"}.isdisjoint(changes)
    sources, lenient = [], set()
    matched = match_sources(state, settings)
    for number, (name, fingerprint) in enumerate(settings.fingerprints.items()):
        saved = state["sources"].get(matched.get(name))
        if saved is None:
            sources.append(SourceState(PackerState(starts[name])))
            continue
        if reordered or fingerprint.digest != saved["fingerprint"]["digest"]:
            lenient.add(number)
        limit = settings.max_epochs[name]
        sources.append(
            SourceState(
                PackerState(tuple(saved["cursor"]), saved["offset"], tuple((s, used) for s, used in saved["window"])),
                Counts(**saved["tally"]),
                0 if "mixture" in changes else saved["share"],
                saved["ended"] and limit is not None and saved["cursor"][0] >= limit,
            )
        )
    return Resume(ReaderState(state["step"], state["phase"], tuple(sources)), frozenset(lenient))


def _differences(state: Mapping[str, Any], settings: LoaderSettings) -> list[tuple[str, str]]:
    """List `(change, line of the message)` for all that would have changed the batches up to now."""
    found: list[tuple[str, str]] = []
    saved = state["settings"]
    for change in ("tokenizer", "seed", "shuffle", "global_batch_size"):
        now = getattr(settings, change)
        if saved[change] != now:
            found.append((change, f"{change}: saved {saved[change]!r}, now {now!r}"))
    packing = _dump_packing(settings.packing)
    names = {key: name for name, key in _PACKING_KEYS.items()}
    found += [
        ("packing", f"packing.{names.get(key, key)}: saved {then!r}, now {now!r}")
        for key in sorted({*saved["packing"], *packing})
        if (then := saved["packing"].get(key)) != (now := packing.get(key))
    ]
    matched = match_sources(state, settings)
    for name, fingerprint in settings.fingerprints.items():
        if (source := state["sources"].get(matched.get(name))) is not None:
            lines = list_differences(Fingerprint.from_json(source["fingerprint"]), fingerprint)
            found += [("data", f"data of source {name!r}: {line}") for line in lines]
            now = settings.max_epochs[name]
            if source["max_epochs"] != now and (source["ended"] or (now is not None and source["cursor"][0] >= now)):
                found.append(("mixture", f"max_epochs of {name!r}: saved {source['max_epochs']}, now {now}"))
    found += _phase_differences(state, settings, matched)
    return found + _renamed(state, settings, matched) if found else found


def _renamed(state: Mapping[str, Any], settings: LoaderSettings, matched: Mapping[str, str]) -> list[tuple[str, str]]:
    """Point out sources that have only another name."""
    missing = {name: source for name, source in state["sources"].items() if name not in matched.values()}
    return [
        ("mixture", f"source {name!r} has the documents of the saved source {then!r}: continue it under that name")
        for name, fingerprint in settings.fingerprints.items()
        for then, source in missing.items()
        if name not in matched and fingerprint.count > 0 and fingerprint.digest == source["fingerprint"]["digest"]
    ]


def _phase_differences(
    state: Mapping[str, Any], settings: LoaderSettings, matched: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Compare the phases that have begun; later phases may change freely."""
    step = max(state["step"], 1)
    names = [matched.get(name, name) for name in settings.fingerprints]
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
    """Return the values of a key by the steps at which it took them."""
    switches: dict[int, Any] = {}
    last = None
    for phase in phases:
        if phase[key] != last:
            switches[phase["from_step"]] = last = phase[key]
    return switches


def _dump_phase(phase: ResolvedPhase, names: Sequence[str]) -> dict[str, Any]:
    # Sources without weight are left out: adding or removing one changes nothing.
    weights = {name: weight for name, weight in zip(names, phase.weights, strict=True) if weight > 0}
    return {"from_step": phase.from_step, "weights": weights, "seq_len": phase.seq_len}


def _dump_packing(packing: Packing) -> dict[str, Any]:
    """Serialize the options that this kind of packing uses."""
    unused = {"concat": {"long_documents", "packing_window"}, "one_per_row": {"packing_window"}, "best_fit": set[str]()}
    used = {key: value for key, value in asdict(packing).items() if key not in unused[packing.kind]}
    return {_PACKING_KEYS.get(key, key): value for key, value in used.items()}


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()[:16]
