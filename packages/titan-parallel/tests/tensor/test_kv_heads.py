"""Ranks that outnumber the key/value heads share them, and train to the losses of one process."""

from __future__ import annotations

import pytest
import torch

import parallel_heads as heads
import parallel_misuse as misuse
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, LayoutError, ParallelOptions, check_plan


@pytest.fixture(scope="module")
def plain() -> dict[int, dict]:
    return {kv_heads: heads.reference(kv_heads) for kv_heads in (1, 2)}


def test_two_ranks_share_one_head(ranks2: Ranks, plain: dict[int, dict]) -> None:
    assert_same_training(ranks2.run(heads.train, Degrees(tp=2), 1), plain[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ParallelOptions(sequence_parallel=False, activation_checkpointing="selective"),
        pytest.param(ParallelOptions(compile_blocks=True, compile_backend="aot_eager"), marks=pytest.mark.nightly),
    ],
    ids=["no-sp-sac", "compile"],
)
def test_with_options(ranks2: Ranks, plain: dict[int, dict], options: ParallelOptions) -> None:
    assert_same_training(ranks2.run(heads.train, Degrees(tp=2), 1, options, 2), plain[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "kv_heads"),
    [
        (Degrees(tp=4), 2),
        (Degrees(tp=2), 1),
        pytest.param(Degrees(dp_replicate=2, tp=2), 1, marks=pytest.mark.nightly),
    ],
    ids=["tp4-of-2", "fsdp-tp2-of-1", "ddp-tp2-of-1"],
)
def test_four_ranks(ranks4: Ranks, plain: dict[int, dict], degrees: Degrees, kv_heads: int) -> None:
    assert_same_training(ranks4.run(heads.train, degrees, kv_heads, None, 2), plain[kv_heads])


@pytest.mark.parametrize(
    "degrees", [Degrees(tp=4), pytest.param(Degrees(tp=2), marks=pytest.mark.slow)], ids=["tp4", "fsdp-tp2"]
)
def test_what_ranks_hold(ranks4: Ranks, ranks1: Ranks, degrees: Degrees) -> None:
    kv_heads = degrees.tp // 2
    expected = ranks1.run(heads.held, Degrees(), kv_heads)[0]
    width, dim = heads.WIDTH, heads.DIM
    for answer in ranks4.run(heads.held, degrees, kv_heads):
        assert answer["shape"] == (kv_heads * width, dim)
        assert answer["same"]
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        if degrees.tp == 4:  # ranks 0 and 1 hold the first head, 2 and 3 the second
            head = answer["tp"] // 2
            assert torch.equal(answer["local"], expected["local"][head * width : (head + 1) * width])
        else:  # FSDP has cut the one head in two
            assert answer["local"].shape == (width // 2, dim)


@pytest.mark.parametrize(
    ("query", "kv", "tp", "fits"), [(24, 3, 2, [1, 3, 6, 12, 24]), (12, 4, 3, [1, 2, 4, 12]), (8, 8, 16, [1, 2, 4, 8])]
)
def test_degrees_that_share_no_heads(query: int, kv: int, tp: int, fits: list[int]) -> None:
    plan = {"tensor": {"k": "colwise_kv"}, "heads": (query, kv), "divisible": {"heads": query}}
    with pytest.raises(LayoutError) as refused:
        check_plan(plan, Degrees(tp=tp))
    assert str(refused.value).endswith(f"these degrees would: {fits}")
    for degree in fits:
        check_plan(plan, Degrees(tp=degree))


def test_number_of_heads_is_needed() -> None:
    with pytest.raises(LayoutError, match=r"uses 'colwise_kv', which requires plan\['heads'\]"):
        check_plan({"tensor": {"k": "colwise_kv"}}, Degrees(tp=2))


def test_what_is_no_projection(ranks2: Ranks) -> None:
    for message in ranks2.run(
        misuse.refusal, Degrees(tp=2), False, {"tensor": {"table": "colwise_kv"}, "heads": (4, 1)}
    ):
        assert (
            "'table' is a Embedding; with fewer key/value heads than tp ranks 'colwise_kv' requires an nn.Linear"
            in message
        )
