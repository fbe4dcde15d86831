"""Which source a row comes from: shares in tokens, kept to within one row at any time, and switched at given steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from titan_data.errors import DataError
from titan_data.sources.base import Source, check_source


@dataclass(frozen=True)
class Weighted:
    """A source in a mixture.

    Attributes:
        source: where documents come from.
        weight: its share of the tokens, against the sum of all weights. Zero: not used until a stage says so.
        max_epochs: how often its documents are used at most; None: as often as it takes.
        at_end: what happens then. "drop": it leaves the mixture, and the others' shares grow in proportion; when
            none is left, the iteration ends. "error": the loader raises DataError.
    """

    source: Source
    weight: float = 1.0
    max_epochs: int | None = None
    at_end: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        check_source(self.source)
        _check_weight(self.source.name, self.weight)
        if self.max_epochs is not None and self.max_epochs < 1:
            raise DataError(
                f"source {self.source.name!r}: max_epochs must be at least 1 or None, not {self.max_epochs}"
            )
        if self.at_end not in ("drop", "error"):
            raise DataError(f"source {self.source.name!r}: at_end is 'drop' or 'error', not {self.at_end!r}")


@dataclass(frozen=True)
class Stage:
    """What changes at a step, until a later stage changes it again.

    Attributes:
        from_step: number of the first global batch (they count from 0) made in this way.
        weights: new weights by the sources' names, 0 for those not named; None: as before.
        seq_len: new S; None: as before.
    """

    from_step: int
    weights: Mapping[str, float] | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Phase:
    """What holds from one step to the next switch: all of it spelt out. `weights` are in the order of the sources."""

    from_step: int
    weights: tuple[float, ...]
    seq_len: int


def plan_phases(parts: Sequence[Weighted], seq_len: int, stages: Sequence[Stage]) -> list[Phase]:
    """Spell out the stages.

    Args:
        parts: the sources.
        seq_len: S at the beginning.
        stages: what changes, in the order of the steps.

    Returns:
        One phase from step 0 and one for each stage that changes something. The weights of each sum up to 1.

    Raises:
        DataError: stages out of order, unknown names, weights or lengths that cannot be.
    """
    names = [part.source.name for part in parts]
    if not names:
        raise DataError("a loader needs at least one source")
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"several sources are called {', '.join(map(repr, doubles))}: give each a name of its own")
    phases = [Phase(0, _shares(0, [part.weight for part in parts]), _checked_length(seq_len))]
    last_step = 0
    for stage in stages:
        if stage.from_step <= last_step:
            raise DataError(
                f"stages must be in the order of their steps and begin after step 0: {stage.from_step} follows "
                f"{last_step}"
            )
        last_step = stage.from_step
        before = phases[-1]
        shares, length = before.weights, before.seq_len
        if stage.weights is not None:
            if unknown := sorted(stage.weights.keys() - set(names)):
                raise DataError(
                    f"the stage from step {stage.from_step} names {', '.join(map(repr, unknown))}; the sources are "
                    f"{', '.join(map(repr, names))}"
                )
            weights = [stage.weights.get(name, 0.0) for name in names]
            for name, weight in zip(names, weights, strict=True):
                _check_weight(name, weight)
            shares = _shares(stage.from_step, weights)
        if stage.seq_len is not None:
            length = _checked_length(stage.seq_len)
        # What changes nothing is no switch: it must not make the sources' shares count from zero.
        if (shares, length) != (before.weights, before.seq_len):
            phases.append(Phase(stage.from_step, shares, length))
    return phases


def choose_source(weights: Sequence[float], tokens: Sequence[int], row: int) -> int | None:
    """Choose where the next row comes from.

    The quota method of Balinski and Young ("The Quota Method of Apportionment", 1975): of the sources that one row more
    would not lift above their share, the one whose next row is due first. With rows of equal length every source
    is at any time less than one row away from its share, which taking the largest deficit does not hold to. Of sources
    due at the same time, the first.

    Args:
        weights: of the sources, not normalised; zero for those out of use.
        tokens: taken from each since these weights hold. Those of sources out of use do not count, so that where one
            leaves the others keep their proportions.
        row: tokens in a row.

    Returns:
        The number of the source; None if all weights are zero.
    """
    whole = sum(weights)
    used = sum(count for count, weight in zip(tokens, weights, strict=True) if weight > 0) + row
    best: tuple[bool, float, int] | None = None
    for number, (weight, count) in enumerate(zip(weights, tokens, strict=True)):
        if weight > 0:
            over = count * whole >= weight * used
            due = (count + row) / weight
            if best is None or (over, due) < best[:2]:
                best = (over, due, number)
    return None if best is None else best[2]


def _shares(from_step: int, weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    if total <= 0:
        raise DataError(f"all weights are zero from step {from_step} on: one at least must be larger")
    # To 12 digits, as 7 : 3 and 0.7 : 0.3 are one mixture, and have to give one order.
    return tuple(float(f"{weight / total:.12g}") for weight in weights)


def _checked_length(seq_len: int) -> int:
    if seq_len < 1:
        raise DataError(f"seq_len must be at least 1, not {seq_len}")
    return seq_len


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(f"source {name!r}: a weight is a number from 0 up, not {weight}")
