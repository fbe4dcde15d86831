"""How long torch's schedules take if nothing but computing takes time: what `bubble_share` is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from titan_parallel.pipeline.schedule_csv import Action

_COST = {"F": 1, "B": 2, "I": 1, "W": 1}


def makespan(order: Mapping[int, Sequence[Action]]) -> int:
    """Return the time at which the last rank ends the actions of a schedule that can run."""
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
    assert all(place[rank] == len(row) for rank, row in order.items())
    return max(clock.values())


def _needs(action: Action, last: int) -> list[Action]:
    """Return the actions that must have ended before an action begins."""
    if action.kind == "F":
        return [action._replace(stage=action.stage - 1)] if action.stage else []
    if action.kind == "W":
        return [action._replace(kind="I")]
    after = [] if action.stage == last else [action._replace(stage=action.stage + 1, kind="I")]
    return [action._replace(kind="F"), *after]
