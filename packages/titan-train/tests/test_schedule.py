"""The learning rate is a continuous function of the step that ends where it should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_train.config import ScheduleSection
from titan_train.schedule import lr_factor

schedules = st.builds(
    ScheduleSection,
    warmup_steps=st.integers(0, 50),
    decay=st.sampled_from(["none", "linear", "cosine"]),
    decay_steps=st.none() | st.integers(1, 200),
    min_factor=st.floats(0, 1),
)


@given(schedules, st.integers(51, 300))
def test_shape(schedule: ScheduleSection, total: int) -> None:
    factors = [lr_factor(step, total, schedule) for step in range(1, total + 1)]
    peak = max(schedule.warmup_steps, 1) - 1
    assert factors[peak] == 1.0 or schedule.warmup_steps == 0
    assert all(0 < f <= 1 or schedule.min_factor == 0 for f in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule.decay == "none" else schedule.min_factor)


def test_a_plateau_comes_before_a_decay_of_given_length() -> None:
    schedule = ScheduleSection(warmup_steps=10, decay="linear", decay_steps=20, min_factor=0.0)
    factors = [lr_factor(step, 100, schedule) for step in range(1, 101)]
    assert factors[4] == 0.5
    assert factors[9:80] == [1.0] * 71
    assert factors[89] == pytest.approx(0.5)
    assert factors[99] == 0.0
