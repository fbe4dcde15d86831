"""A regression model with parameters in unusual places trains as in one process."""

from __future__ import annotations

import pytest
import torch

import parallel_regressor
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions


@pytest.fixture(scope="module")
def plain() -> dict:
    return parallel_regressor.reference()


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(), ParallelOptions()),
        (Degrees(tp=2), ParallelOptions()),
        (Degrees(tp=2), ParallelOptions(sequence_parallel=False, activation_checkpointing="selective")),
    ],
    ids=["fsdp", "tp", "tp-no-sp"],
)
def test_regressor(ranks2: Ranks, plain: dict, degrees: Degrees, options: ParallelOptions) -> None:
    assert plain["losses"][0] / plain["losses"][-1] > 1.2
    for result in ranks2.run(parallel_regressor.train, degrees, options):
        assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert result["weights"].keys() == plain["weights"].keys()
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight)
        assert result["frozen"] == ["layers.1.norm.inner.bias"]
