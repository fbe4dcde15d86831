"""The root conftest: seeds of tests, and the profile of hypothesis."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from hypothesis import settings


@pytest.mark.parametrize("case", range(2))
def test_every_test_starts_from_its_own_seed(seed: int, case: int) -> None:
    assert random.random() == random.Random(seed).random()
    assert numpy.random.rand() == numpy.random.RandomState(seed).rand()
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(seed))


def test_names_tell_seeds_apart(seed: int, request: pytest.FixtureRequest) -> None:
    assert "test_names_tell_seeds_apart" in request.node.nodeid
    assert seed != 0


def test_examples_are_the_same_on_every_run_by_default(request: pytest.FixtureRequest) -> None:
    if settings.get_current_profile_name() != "ci":
        pytest.skip("another profile is asked for")
    assert settings.default is not None
    assert settings.default.derandomize
