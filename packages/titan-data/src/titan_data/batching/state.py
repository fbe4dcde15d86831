"""A loader's saved state as JSON: writing it, and checking that a loader can resume from it.

Called by `Loader.state_dict` and `Loader.load_state_dict`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from titan_data.batching.changes import Change, list_changes, match_sources
from titan_data.batching.documents import Cursor
from titan_data.batching.global_batches import Counts, ReaderState, SourceState
from titan_data.batching.packing import PackerState
from titan_data.batching.settings import LoaderSettings, dump_packing, dump_phase
from titan_data.errors import ChangedDataError, DataError
from titan_data.fingerprint import MAX_ITEMS, Fingerprint

STATE_VERSION = 1


def dump_state(reader: ReaderState, settings: LoaderSettings) -> dict[str, Any]:
    """Serialize a loader's state.

    Args:
        reader: The state of its batch reader.
        settings: Its settings.

    Returns:
        JSON values; equal for equal arguments.
    """
    names = list(settings.fingerprints)
    listed = _listed(settings.fingerprints)
    state: dict[str, Any] = {
        "version": STATE_VERSION,
        "step": reader.step,
        "phase": reader.phase_start,
        "settings": {
            "seed": settings.seed,
            "shuffle": settings.shuffle,
            "tokenizer": settings.tokenizer,
            "global_batch_size": settings.global_batch_size,
            "packing": dump_packing(settings.packing),
        },
        "phases": [dump_phase(phase, names) for phase in settings.phases],
        "sources": {
            name: {
                "cursor": list(source.packer.cursor),
                "offset": source.packer.offset,
                "window": [list(used) for used in source.packer.window],
                "tally": source.counts._asdict(),
                "share": source.phase_tokens,
                "ended": source.ended,
                "max_epochs": settings.max_epochs[name],
                "fingerprint": settings.fingerprints[name].to_json(with_items=name in listed),
                # Left out where it is the name.
                **({} if settings.identities[name] == name else {"identity": settings.identities[name]}),
            }
            for name, source in zip(names, reader.sources, strict=True)
        },
    }
    return {**state, "checksum": _checksum(state)}


def _listed(fingerprints: Mapping[str, Fingerprint]) -> set[str]:
    """Return the names of the sources whose items the state lists, so that a resume can name those that changed.

    There are up to `MAX_ITEMS` in all, of the sources with the fewest: the state of many sources stays small.
    """
    listed, items = set(), 0
    for name in sorted(fingerprints, key=lambda name: (fingerprints[name].count, name)):
        items += fingerprints[name].count
        if items > MAX_ITEMS:
            break
        listed.add(name)
    return listed


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
    differences = list_changes(state, settings)
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


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()[:16]
