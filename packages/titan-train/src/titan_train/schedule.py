"""The learning rate as a function of the step and nothing else: there is no state to save or to get wrong."""

from __future__ import annotations

import math

from titan_train.config import ScheduleSection


def lr_factor(step: int, total: int, schedule: ScheduleSection) -> float:
    """Return the share of the peak learning rate that an update uses.

    Args:
        step: The update, from 1.
        total: The last update.
        schedule: Its shape.

    Returns:
        Between 0 and 1.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    start = schedule.warmup_steps
    if schedule.decay_steps is not None:
        start = max(start, total - schedule.decay_steps)
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / (total - start))
    remaining = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.min_factor + (1 - schedule.min_factor) * remaining
