"""What FSDP2 keeps gathered, offloads and sums when changes memory and traffic, not the results."""

from __future__ import annotations

import pytest

import parallel_cases as cases
import parallel_sharding
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, LayoutError, ParallelOptions, ParallelPlan, check_plan
from titan_parallel.options import reshard_blocks


@pytest.mark.parametrize("pp", [1, 2])
def test_resharding_by_case(pp: int) -> None:
    answers = {
        asked: reshard_blocks(ParallelOptions(reshard_after_forward=asked), pp) for asked in ("always", "never", 4)
    }
    assert answers == {"always": True, "never": False, 4: 4}
    assert reshard_blocks(ParallelOptions(), pp) is (pp == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "kept_by"),
    [("default", 4), ("never", 1), (2, 2)],
)
def test_what_stays_gathered(ranks4: Ranks, plain: dict, asked: str | int, kept_by: int) -> None:
    options = ParallelOptions(reshard_after_forward=asked)
    assert ranks4.run(parallel_sharding.gathered_between, options) == [[kept_by] * 3] * 4
    assert_same_training(ranks4.run(cases.train, Degrees(), options), plain)


@pytest.mark.parametrize(
    ("degrees", "microbatches"),
    [(Degrees(), 1), (Degrees(dp_replicate=2), 1), pytest.param(Degrees(tp=2), 2, marks=pytest.mark.slow)],
    ids=["fsdp", "ddp", "tp"],
)
def test_offload(ranks2: Ranks, plain: dict, degrees: Degrees, microbatches: int) -> None:
    assert_same_training(
        ranks2.run(cases.train, degrees, ParallelOptions(cpu_offload=True), False, microbatches), plain
    )


def test_what_is_offloaded(ranks1: Ranks, ranks2: Ranks) -> None:
    for group in (ranks1, ranks2):
        for offload, places, buffers in group.run(parallel_sharding.offloaded):
            assert len(offload) == 6  # the table, three blocks, norm, head
            assert all(offload)
            assert places == buffers == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(dp_replicate=2),
        pytest.param(Degrees(), marks=pytest.mark.nightly),
        pytest.param(Degrees(tp=2), marks=pytest.mark.nightly),
    ],
    ids=["hsdp", "fsdp", "fsdp-tp"],
)
def test_gradients_summed_once_a_step(ranks4: Ranks, plain: dict, degrees: Degrees) -> None:
    assert_same_training(
        ranks4.run(cases.train, degrees, ParallelOptions(reduce_every_microbatch=False), False, 2), plain
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            "sometimes",
            "reshard_after_forward: 'sometimes' is not one of ['default', 'always', 'never', 'a number of ranks']",
        ),
        (False, "reshard_after_forward: False is a bool; set 'never'"),
        (
            5,
            "5 does not divide the 12 ranks that shard the weights (dp_shard x cp x ep) into equal groups; these "
            "numbers would: [2, 3, 4, 6]",
        ),
    ],
)
def test_refusals(asked: str | int, says: str) -> None:
    plan: ParallelPlan = {"experts": ["experts"], "attention": ["core"], "sequence": {"x": 1}, "positions": None}
    degrees = Degrees(dp_shard=3, cp=2, ep=2)
    check_plan(plan, degrees, options=ParallelOptions(reshard_after_forward=3))
    with pytest.raises(LayoutError) as refused:
        check_plan(plan, degrees, options=ParallelOptions(reshard_after_forward=asked))
    assert says in str(refused.value)
