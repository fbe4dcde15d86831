"""Mixtures of experts, spread over ranks and split by tensor parallelism, train as in one process."""

from __future__ import annotations

import pytest

import parallel_experts as cases
from parallel_group import Group
from test_parallel_one_loss import same
from titan_parallel import Degrees, ParallelOptions


@pytest.fixture(scope="module")
def alone() -> dict:
    return cases.reference()


@pytest.mark.parametrize("degrees", [Degrees(ep=2), Degrees(tp=2), Degrees()], ids=["ep", "tp", "fsdp"])
def test_two_processes(two: Group, alone: dict, degrees: Degrees) -> None:
    same(two.run(cases.train, degrees), alone)
