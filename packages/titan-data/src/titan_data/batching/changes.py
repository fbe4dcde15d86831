"""What differs between a saved run and the loader that resumes it, and which of its sources are which.

Called by `state` when a loader resumes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from titan_data.batching.settings import PACKING_KEYS, LoaderSettings, dump_packing, dump_phase
from titan_data.fingerprint import Fingerprint, list_differences

Change = Literal["data", "mixture", "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing"]
"""What may differ from the saved run if the user allows it; see `Loader.load_state_dict`."""


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


def list_changes(state: Mapping[str, Any], settings: LoaderSettings) -> list[tuple[str, str]]:
    """List `(change, line of the message)` for all that would have changed the batches up to now.

    Args:
        state: The saved state.
        settings: Settings of the loader that resumes.
    """
    found: list[tuple[str, str]] = []
    saved = state["settings"]
    for change in ("tokenizer", "seed", "shuffle", "global_batch_size"):
        now = getattr(settings, change)
        if saved[change] != now:
            found.append((change, f"{change}: saved {saved[change]!r}, now {now!r}"))
    packing = dump_packing(settings.packing)
    names = {key: name for name, key in PACKING_KEYS.items()}
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
    today = [dump_phase(phase, names) for phase in settings.phases if phase.from_step < step]
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
