"""Models of `transformers`, which knows nothing of titan, train to the losses and weights of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import parallel_transformers
from parallel_group import Group
from titan_parallel import Degrees, ParallelOptions

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # it takes seconds to import, in each process


@pytest.fixture(scope="module", params=parallel_transformers.PLANS)
def plain(request: pytest.FixtureRequest) -> tuple[str, list[float], dict[str, Tensor]]:
    return request.param, *parallel_transformers.reference(parallel_transformers.build(request.param))


def same(group: Group, plain: tuple[str, list[float], dict[str, Tensor]], *layout: object) -> None:
    family, expected, weights = plain
    assert expected[0] - expected[-1] > 0.05  # a curve to follow
    answers = group.run(parallel_transformers.train, family, *layout)
    for losses, trained, logits in answers:
        assert losses == pytest.approx(expected, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, answers[0][2])
        assert logits.shape == (parallel_transformers.ROWS, parallel_transformers.SEQ, parallel_transformers.VOCAB)


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2)], ids=["fsdp", "tp"])
def test_two_processes(two: Group, plain: tuple[str, list[float], dict[str, Tensor]], degrees: Degrees) -> None:
    same(two, plain, degrees, ParallelOptions())


@pytest.mark.parametrize(
    "options",
    [ParallelOptions(), ParallelOptions(sequence_parallel=False, activation_checkpointing="selective")],
    ids=["sp", "no-sp-sac"],
)
def test_four_processes(
    four: Group, plain: tuple[str, list[float], dict[str, Tensor]], options: ParallelOptions
) -> None:
    same(four, plain, Degrees(tp=2), options)
