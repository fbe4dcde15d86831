"""Reading a pipeline schedule from a CSV file, with checks that need no processes.

`schedules.place_stages` calls `read_schedule`. That the actions can run in their order, without ranks that wait for
each other forever, is checked by torch: `check_order`, called by `build.make_stages` before anything is sent.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_parallel._torch_compat import check_schedule
from titan_parallel.errors import LayoutError

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")


class Action(NamedTuple):
    """One computation of a rank; `kind` is F, B, I or W."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule from a file.

    Attributes:
        path: Path of the file.
        rows: Actions of each rank.
        ranks: The rank of each stage.
        microbatches: Number of microbatches that it is for.
        splits_backward: Whether backward is split into two halves.
    """

    path: str
    rows: tuple[tuple[Action, ...], ...]
    ranks: tuple[int, ...]
    microbatches: int
    splits_backward: bool


def read_schedule(path: str, pp: int) -> ScheduleFile:
    """Read a schedule and check that it is complete.

    Args:
        path: Path of a CSV file with one row per rank and one action per cell, such as `0F3`; cells may be empty.
        pp: Number of ranks.

    Raises:
        LayoutError: If it cannot be read, does not fit the number of ranks, or actions are missing.
    """
    try:
        with Path(path).open(newline="") as file:
            rows = [tuple(action for cell in row for action in _actions(cell, path)) for row in csv.reader(file) if row]
    except OSError as error:
        raise LayoutError(f"pipeline schedule {path}: {error.strerror or error}") from None
    if len(rows) != pp or not all(rows):
        filled = sum(1 for row in rows if row)
        raise LayoutError(f"pipeline schedule {path}: has {filled} rows with actions, but pp={pp} requires {pp}")
    ranks = _stage_ranks(dict(enumerate(rows)), path)
    microbatches = max(action.microbatch for row in rows for action in row) + 1
    _check_complete(rows, len(ranks), microbatches, path)
    kinds = {action.kind for row in rows for action in row}
    return ScheduleFile(path, tuple(rows), ranks, microbatches, bool(kinds & {"I", "W"}))


def check_order(file: ScheduleFile) -> None:
    """Check that each action of a schedule can run when its turn comes. Imports torch's pipelining: takes seconds.

    Raises:
        LayoutError: If not, with torch's reason.
    """
    order = {rank: [str(action) for action in row] for rank, row in enumerate(file.rows)}
    try:
        check_schedule(order, file.ranks, file.microbatches)
    except AssertionError as error:
        reason = str(error).strip().split("\n")[0]
        raise LayoutError(
            f"pipeline schedule {file.path}: its actions cannot run in this order, some would wait forever for actions "
            f"that come later (torch: {reason})"
        ) from None


def _actions(cell: str, path: str) -> list[Action]:
    text = cell.strip()
    both = _OVERLAPPED.fullmatch(text)
    parts = both[1].split(";") if both else [text] if text else []
    found = [_ACTION.fullmatch(part.strip()) for part in parts]
    if None in found:
        raise LayoutError(
            f"pipeline schedule {path}: invalid action {text!r}; write stage, kind (F, B, I or W) and microbatch, such "
            "as 0F3"
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
        what = f"has no actions of stages {missing}" if missing else f"has stages on several ranks: {shared}"
        what = what if missing or shared else "has more stages on some ranks than on others"
        raise LayoutError(f"pipeline schedule {path}: {what}")
    return tuple(next(iter(where[stage])) for stage in range(len(where)))


def _check_complete(rows: Sequence[Sequence[Action]], stages: int, microbatches: int, path: str) -> None:
    counts = Counter(action for row in rows for action in row)
    wrong = []
    for stage in range(stages):
        for microbatch in range(microbatches):
            forward, backward, inputs, weights = (counts[Action(stage, kind, microbatch)] for kind in "FBIW")
            if forward != 1 or (backward, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                wrong.append(f"stage {stage}, microbatch {microbatch}")
    if wrong:
        raise LayoutError(
            f"pipeline schedule {path}: every stage needs one F and either one B or one I and one W for each of the "
            f"{microbatches} microbatches; this does not hold for {'; '.join(wrong[:3])}"
        )
    # torch does not check this, and would return the losses in the wrong order.
    last = [action.microbatch for row in rows for action in row if (action.stage, action.kind) == (stages - 1, "F")]
    if last != sorted(last):
        raise LayoutError(f"pipeline schedule {path}: the last stage must run the microbatches in their order")
