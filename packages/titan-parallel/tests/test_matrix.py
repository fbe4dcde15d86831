"""The matrix of `parallel_matrix.py`, each case against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import parallel_matrix as matrix
import parallel_net as net
from parallel_matrix import Case
from parity import assert_same_training
from ranks import Ranks


@functools.cache
def expected(shape: net.Shape) -> dict:
    return net.reference(shape)


def marks(case: Case) -> list[pytest.MarkDecorator]:
    return [getattr(pytest.mark, case.mark)] if case.mark else []


@pytest.mark.parametrize("shape", [matrix.DENSE, matrix.MOE, net.Shape(tied=True)], ids=["dense", "moe", "tied"])
def test_losses_move(shape: net.Shape) -> None:
    # The other tests compare curves: they must be curves, and clipping must act.
    plain = expected(shape)
    assert max(plain["losses"]) - min(plain["losses"]) > 0.05
    assert min(plain["norms"]) > net.MAX_NORM


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks(case)) for case in matrix.cases()])
def test_one_loss(case: Case, ranks: Callable[[int], Ranks]) -> None:
    results = ranks(case.world).run(matrix.train, case, timeout=300.0)
    assert_same_training(results, expected(case.shape), stages=True)
