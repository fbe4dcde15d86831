"""The learning rate as a pure function of the step: there is no state to save."""

from __future__ import annotations

import math

from titan_train.config.training import ScheduleSection


def lr_factor(step: int, total: int, schedule: ScheduleSection) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    Linear warm-up from 0 to the peak, a plateau, then the decay, which ends with the last step.

    Args:
        step: The step, counted from 1.
        total: The last step.
        schedule: The shape.

    Returns:
        The fraction, from 0 to 1.
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
