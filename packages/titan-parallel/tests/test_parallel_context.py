"""Context parallelism: every kind, in every product, trains to the losses of one process."""

from __future__ import annotations

import pytest
import torch

import parallel_context as cases
from parallel_group import Group
from test_parallel_one_loss import same
from titan_parallel import Degrees, ParallelOptions

KINDS = ["allgather", "ring", "ulysses"]


@pytest.fixture(scope="module")
def masked() -> dict:
    return cases.reference()


@pytest.mark.parametrize("kind", KINDS)
def test_cp(two: Group, masked: dict, kind: str) -> None:
    same(two.run(cases.train, Degrees(cp=2), ParallelOptions(context=kind)), masked)
