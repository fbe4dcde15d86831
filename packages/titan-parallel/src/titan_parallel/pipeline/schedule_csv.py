"""A pipeline schedule from a CSV file: read, checked, and timed, without processes."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_parallel.errors import LayoutError

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")
_COST = {"F": 1, "B": 2, "I": 1, "W": 1}


class Action(NamedTuple):
    """One thing that a rank does: `kind` is F, B, I or W."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule that can run.

    Attributes:
        ranks: The rank of each stage.
        microbatches: How many it is for.
        splits_backward: Whether a backward comes in two halves.
        bubble_share: See `titan_parallel.bubble_share`.
    """

    ranks: tuple[int, ...]
    microbatches: int
    splits_backward: bool
    bubble_share: float


def read_schedule(path: str, pp: int) -> ScheduleFile:
    """Read a schedule and check that it can run.

    Args:
        path: Of a CSV file with one row for each rank, and one action in each cell, such as `0F3`; cells may be empty.
        pp: Number of ranks.

    Raises:
        LayoutError: If it cannot be read, does not fit the ranks, leaves something out, or waits for itself.
    """
    try:
        with Path(path).open(newline="") as file:
            rows = [[action for cell in row for action in _actions(cell, path)] for row in csv.reader(file) if row]
    except OSError as error:
        raise LayoutError(f"pipeline schedule {path}: {error.strerror or error}") from None
    if len(rows) != pp or not all(rows):
        filled = sum(1 for row in rows if row)
        raise LayoutError(f"pipeline schedule {path} has {filled} rows with actions, but pp is {pp}: it needs {pp}")
    order = dict(enumerate(rows))
    ranks = _stage_ranks(order, path)
    microbatches = max(action.microbatch for row in rows for action in row) + 1
    _check_complete(rows, len(ranks), microbatches, path)
    time = makespan(order, path)
    work = 3 * len(ranks) * microbatches / pp
    kinds = {action.kind for row in rows for action in row}
    return ScheduleFile(ranks, microbatches, bool(kinds & {"I", "W"}), 1 - work / time)


def makespan(order: Mapping[int, Sequence[Action]], name: str) -> int:
    """Return how long a schedule takes if each of F, I and W takes 1, and what is sent takes nothing.

    Args:
        order: Actions of each rank.
        name: For the message.

    Raises:
        LayoutError: If ranks wait for one another forever; the message names what they wait at.
    """
    last = max(action.stage for row in order.values() for action in row)
    ended: dict[Action, int] = {}
    clock, place = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    moving = True
    while moving:
        moving = False
        for rank, row in order.items():
            while place[rank] < len(row):
                action = row[place[rank]]
                needs = _needs(action, last)
                if not all(need in ended for need in needs):
                    break
                clock[rank] = max([clock[rank], *(ended[need] for need in needs)]) + _COST[action.kind]
                for done in [action] if action.kind != "B" else [action, action._replace(kind="I")]:
                    ended[done] = clock[rank]
                place[rank] += 1
                moving = True
    stuck = [f"rank {rank} at {row[place[rank]]}" for rank, row in order.items() if place[rank] < len(row)]
    if stuck:
        raise LayoutError(f"pipeline schedule {name} would never end: {', '.join(stuck)} wait for what comes later")
    return max(clock.values())


def _actions(cell: str, path: str) -> list[Action]:
    text = cell.strip()
    both = _OVERLAPPED.fullmatch(text)
    parts = both[1].split(";") if both else [text] if text else []
    found = [_ACTION.fullmatch(part.strip()) for part in parts]
    if None in found:
        raise LayoutError(
            f"pipeline schedule {path}: {text!r} is no action; one is written as stage, kind (F, B, I or W) and "
            "microbatch, such as 0F3"
        )
    return [Action(int(match[1]), match[2], int(match[3])) for match in found if match]


def _stage_ranks(order: Mapping[int, Sequence[Action]], path: str) -> tuple[int, ...]:
    where: dict[int, set[int]] = {}
    for rank, row in order.items():
        for action in row:
            where.setdefault(action.stage, set()).add(rank)
    missing = sorted(set(range(max(where) + 1)) - where.keys())
    shared = {stage: sorted(ranks) for stage, ranks in where.items() if len(ranks) > 1}
    uneven = len({len([1 for ranks in where.values() if rank in ranks]) for rank in order}) > 1
    if missing or shared or uneven:
        what = f"leaves out stages {missing}" if missing else f"has stages on several ranks: {shared}"
        what = what if missing or shared else "has more stages on some ranks than on others"
        raise LayoutError(f"pipeline schedule {path} {what}")
    return tuple(next(iter(where[stage])) for stage in range(len(where)))


def _check_complete(rows: Sequence[Sequence[Action]], stages: int, microbatches: int, path: str) -> None:
    counts = Counter(action for row in rows for action in row)
    wrong = []
    for stage in range(stages):
        for microbatch in range(microbatches):
            forward, whole, inputs, weights = (counts[Action(stage, kind, microbatch)] for kind in "FBIW")
            if forward != 1 or (whole, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                wrong.append(f"stage {stage}, microbatch {microbatch}")
    if wrong:
        raise LayoutError(
            f"pipeline schedule {path}: every stage needs one F and either one B or one I and one W for each of the "
            f"{microbatches} microbatches; it is otherwise for {'; '.join(wrong[:3])}"
        )
    last = [action.microbatch for row in rows for action in row if (action.stage, action.kind) == (stages - 1, "F")]
    if last != sorted(last):
        raise LayoutError(f"pipeline schedule {path}: the last stage has to take the microbatches in their order")


def _needs(action: Action, last: int) -> list[Action]:
    """Return what has to have ended before an action begins."""
    if action.kind == "F":
        return [action._replace(stage=action.stage - 1)] if action.stage else []
    if action.kind == "W":
        return [action._replace(kind="I")]
    after = [] if action.stage == last else [action._replace(stage=action.stage + 1, kind="I")]
    return [action._replace(kind="F"), *after]
