"""Mixtures: which source each sequence comes from, by shares in tokens that may change at given steps.

`resolve_phases` is called by `Loader` once, `Turns` by the batch reader for each sequence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Literal

from titan_data.batching.checks import as_int
from titan_data.errors import DataError
from titan_data.sources.base import Source, check_source


@dataclass(frozen=True)
class MixtureSource:
    """A source in a mixture.

    Attributes:
        source: Where documents come from.
        weight: Its share of the tokens, relative to the sum of all weights. Zero: not used until a phase gives it a
            weight.
        max_epochs: How many epochs are used at most; None: no limit.
        at_end: What happens after them. "drop": the source leaves the mixture, and the others' shares grow in
            proportion; when no source is left, the iteration ends. "error": the loader raises DataError.

    Raises:
        DataError: If `source` does not have the members of a source, or another value is out of range.
    """

    source: Source
    weight: float = 1.0
    max_epochs: int | None = None
    at_end: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        check_source(self.source)
        object.__setattr__(self, "weight", float(self.weight))
        if self.max_epochs is not None:
            object.__setattr__(self, "max_epochs", as_int("max_epochs", self.max_epochs))
        _check_weight(self.source.name, self.weight)
        if self.max_epochs is not None and self.max_epochs < 1:
            raise DataError(
                f"source {self.source.name!r}: max_epochs must be at least 1 or None, not {self.max_epochs}"
            )
        if self.at_end not in ("drop", "error"):
            raise DataError(f"source {self.source.name!r}: at_end must be 'drop' or 'error', not {self.at_end!r}")


@dataclass(frozen=True)
class Phase:
    """A change of mixture weights or sequence length at a step. It holds until a later phase changes it again.

    Attributes:
        from_step: First step of the phase; steps count from 0.
        weights: New weights by source name, 0 for sources that are not named; None: unchanged.
        seq_len: New S; None: unchanged.
    """

    from_step: int
    weights: Mapping[str, float] | None = None
    seq_len: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_step", as_int("from_step", self.from_step))
        if self.seq_len is not None:
            object.__setattr__(self, "seq_len", as_int("seq_len", self.seq_len))


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase with nothing left unsaid: `weights` are in the order of the sources and sum to 1."""

    from_step: int
    weights: tuple[float, ...]
    seq_len: int


def resolve_phases(parts: Sequence[MixtureSource], seq_len: int, phases: Sequence[Phase]) -> list[ResolvedPhase]:
    """Fill in what phases leave unchanged.

    Args:
        parts: The sources.
        seq_len: S at step 0.
        phases: The changes, in the order of their steps.

    Returns:
        One phase from step 0, and one for each phase that changes something. The weights of each sum to 1.

    Raises:
        DataError: If phases are out of order, name unknown sources, or have invalid weights or lengths.
    """
    names = [part.source.name for part in parts]
    if not names:
        raise DataError("a loader needs at least one source")
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"several sources are called {', '.join(map(repr, doubles))}: give each a unique name")
    resolved = [ResolvedPhase(0, _shares(0, [part.weight for part in parts]), _checked_length(seq_len))]
    last_step = 0
    for phase in phases:
        if phase.from_step <= last_step:
            raise DataError(
                f"phases must be in the order of their steps and begin after step 0, but from_step {phase.from_step} "
                f"follows {last_step}"
            )
        last_step = phase.from_step
        before = resolved[-1]
        shares, length = before.weights, before.seq_len
        if phase.weights is not None:
            if unknown := sorted(phase.weights.keys() - set(names)):
                raise DataError(
                    f"the phase from step {phase.from_step} names {', '.join(map(repr, unknown))}; the sources are "
                    f"{', '.join(map(repr, names))}"
                )
            weights = [phase.weights.get(name, 0.0) for name in names]
            for name, weight in zip(names, weights, strict=True):
                _check_weight(name, weight)
            shares = _shares(phase.from_step, weights)
        if phase.seq_len is not None:
            length = _checked_length(phase.seq_len)
        # A phase that changes nothing is dropped: it must not reset the sources' token counts.
        if (shares, length) != (before.weights, before.seq_len):
            resolved.append(ResolvedPhase(phase.from_step, shares, length))
    return resolved


class Turns:
    """Says which source each sequence comes from, so that each stays within one sequence of its share at any time.

    The quota method of Balinski and Young ("The Quota Method of Apportionment", 1975): of the sources that one sequence
    more would not lift above their share, the one whose next sequence is due first. With sequences of equal length
    every source is at any time less than one sequence away from its share; taking the largest deficit does not
    guarantee that. Of sources due at the same time, the first.

    The sources wait in a heap, the one that is due first on top. It nearly always is below its share, so that a turn
    takes the same time whatever the number of sources.

    Args:
        weights: Weights of the sources, not normalized; zero for those not in use.
        tokens: Tokens taken from each source since these weights hold. Those of sources not in use do not count, so
            that the others keep their proportions when a source leaves.
        seq_len: Tokens in a sequence.
    """

    def __init__(self, weights: Sequence[float], tokens: Sequence[int], seq_len: int) -> None:
        self._weights, self._tokens, self._seq_len = weights, list(tokens), seq_len
        self._total = sum(weights)
        self._used = sum(count for count, weight in zip(tokens, weights, strict=True) if weight > 0) + seq_len
        self._heap = [(self._due(number), number) for number, weight in enumerate(weights) if weight > 0]
        heapify(self._heap)

    def next(self) -> int | None:
        """Return the number of the source that is due; None if all weights are zero."""
        if not self._heap:
            return None
        passed = []
        while self._heap and self._is_over(self._heap[0][1]):
            passed.append(heappop(self._heap))
        chosen = self._heap[0] if self._heap else passed[0]  # if all are above their share, the one due first
        for entry in passed:
            heappush(self._heap, entry)
        return chosen[1]

    def took(self, number: int, tokens: int) -> None:
        """Count the tokens of a sequence of the source that `next` returned last."""
        self._tokens[number] += tokens
        self._used += tokens
        due = (self._due(number), number)
        if self._heap[0][1] == number:
            heapreplace(self._heap, due)
        else:
            self._heap = [due if entry[1] == number else entry for entry in self._heap]
            heapify(self._heap)

    def _due(self, number: int) -> float:
        return (self._tokens[number] + self._seq_len) / self._weights[number]

    def _is_over(self, number: int) -> bool:
        return self._tokens[number] * self._total >= self._weights[number] * self._used


def _shares(from_step: int, weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    if total <= 0:
        raise DataError(f"all weights are zero from step {from_step} on: at least one must be larger")
    # Rounded to 12 digits: 7 : 3 and 0.7 : 0.3 are the same mixture and have to give the same order.
    return tuple(float(f"{weight / total:.12g}") for weight in weights)


def _checked_length(seq_len: int) -> int:
    if seq_len < 1:
        raise DataError(f"seq_len must be at least 1, not {seq_len}")
    return seq_len


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(f"source {name!r}: a weight must be a finite number of at least 0, not {weight}")
