"""The matrix of `parallel_matrix.py`, each case against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import parallel_matrix as matrix
import parallel_net as net
from parallel_matrix import Case
from ranks import Ranks


@functools.cache
def expected(shape: net.Shape) -> dict:
    return net.reference(shape)


@pytest.mark.parametrize("shape", [matrix.DENSE, matrix.MOE, net.Shape(tied=True)], ids=["dense", "moe", "tied"])
def test_losses_move(shape: net.Shape) -> None:
    # The other tests compare curves: they must be curves, and clipping must act.
    plain = expected(shape)
    assert max(plain["losses"]) - min(plain["losses"]) > 0.05
    assert min(plain["norms"]) > net.MAX_NORM


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.slow else []) for case in matrix.cases()],
)
def test_one_loss(case: Case, ranks: Callable[[int], Ranks]) -> None:
    plain = expected(case.shape)
    held = set()
    for result in ranks(case.world).run(matrix.train, case, timeout=300.0):
        assert result["losses"] == pytest.approx(plain["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(plain["norms"], abs=1e-5, rel=1e-5)
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, plain["weights"][name], rtol=1e-4, atol=1e-4)
        held |= result["weights"].keys()
    assert held == plain["weights"].keys()
