"""Everything that the order of a loader's tokens depends on, and how the saved state writes it.

Made by `Loader`; written by `state`, compared by `changes`. Keys of the JSON belong to a state version and do not
follow renames in the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from titan_data.batching.mixing import ResolvedPhase
from titan_data.batching.packing import Packing
from titan_data.fingerprint import Fingerprint

PACKING_KEYS = {"packing_window": "look_ahead"}  # names in the JSON, where they differ from `Packing`


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


def dump_phase(phase: ResolvedPhase, names: Sequence[str]) -> dict[str, Any]:
    """Serialize a phase; `names` are the names of the sources in the order of its weights."""
    # Sources without weight are left out: adding or removing one changes nothing.
    weights = {name: weight for name, weight in zip(names, phase.weights, strict=True) if weight > 0}
    return {"from_step": phase.from_step, "weights": weights, "seq_len": phase.seq_len}


def dump_packing(packing: Packing) -> dict[str, Any]:
    """Serialize the options that this kind of packing uses."""
    unused = {"concat": {"long_documents", "packing_window"}, "one_per_row": {"packing_window"}, "best_fit": set[str]()}
    used = {key: value for key, value in asdict(packing).items() if key not in unused[packing.kind]}
    return {PACKING_KEYS.get(key, key): value for key, value in used.items()}
