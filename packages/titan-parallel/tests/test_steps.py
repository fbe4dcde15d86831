"""Calls that ranks make together: under autocast, with different arguments, with an error of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

import parallel_steps as steps
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions, PipelineOptions

FSDP, TP, PP = Degrees(), Degrees(tp=2), Degrees(pp=2)
LAYOUTS = pytest.mark.parametrize(
    "degrees",
    [pytest.param(FSDP, id="fsdp"), pytest.param(TP, id="tp", marks=pytest.mark.slow), pytest.param(PP, id="pp")],
)


@pytest.mark.parametrize(
    ("degrees", "options", "inside", "tolerance"),
    [
        (FSDP, ParallelOptions(), False, 1e-4),
        (FSDP, ParallelOptions(activation_checkpointing="full"), True, 1e-4),
        (TP, ParallelOptions(), False, 2e-2),  # partial sums are rounded to bfloat16
        (PP, ParallelOptions(), False, 1e-4),
        (
            PP,
            ParallelOptions(pipeline=PipelineOptions(schedule="InterleavedZeroBubble", stages_per_rank=1)),
            True,
            1e-4,
        ),
    ],
    ids=["fsdp", "fsdp-inside", "tp", "pp", "pp-inside"],
)
def test_autocast_around_steps(
    ranks2: Ranks, degrees: Degrees, options: ParallelOptions, inside: bool, tolerance: float
) -> None:
    expected = steps.autocast_plain(4 if degrees == FSDP else 2)
    for found in ranks2.run(steps.autocast_around, degrees, options, inside):
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=tolerance)


@LAYOUTS
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fewer", "the number of microbatches of forward_backward is 2 on rank 0 and 1 on rank 1"),
        ("tokens", f"num_target_tokens is {steps.SCORED}.0 on rank 0 and {steps.SCORED + 1}.0 on rank 1"),
        ("evaluate", "the number of microbatches of evaluate is 2 on rank 0 and 1 on rank 1"),
        ("call", "the call is forward_backward on rank 0 and evaluate on rank 1"),
    ],
)
def test_ranks_that_disagree_later(ranks2: Ranks, degrees: Degrees, what: str, says: str) -> None:
    for message, is_usable in ranks2.run(steps.disagreement_later, degrees, what):
        assert message.startswith("LayoutError: ranks got different arguments")
        assert says in message
        assert is_usable


@pytest.mark.parametrize(("degrees", "sharing"), [(TP, "tp"), (PP, "pp")], ids=["tp", "pp"])
@pytest.mark.parametrize("call", ["forward_backward", "evaluate", "predict"])
def test_ranks_that_share_sequences_and_read_others(ranks2: Ranks, degrees: Degrees, sharing: str, call: str) -> None:
    for message in ranks2.run(steps.other_data, degrees, call):
        assert message.startswith(f"LayoutError: data: ranks 0 and 1 share sequences ({sharing}), but got different ")
        assert "args[0] of microbatch 0" in message
        assert message.endswith("read the data by `data_axis(mesh).dp_rank`, which is 0 on both")
    assert ranks2.run(steps.other_data, FSDP, call) == ["no error"] * 2


@LAYOUTS
@pytest.mark.parametrize(
    ("call", "at", "first"),
    [
        ("forward_backward", 0, False),
        ("forward_backward", 1, False),
        ("forward_backward", 0, True),
        ("evaluate", 1, True),
    ],
)
def test_a_loss_that_fails_on_one_rank(ranks2: Ranks, degrees: Degrees, call: str, at: int, first: bool) -> None:
    other, own = ranks2.run(steps.failing_loss, degrees, call, at, first)
    assert own == ("ValueError: no loss today", True)
    said = "ValueError: no loss today"  # tensor-parallel ranks compute the loss together, so that it fails on all
    assert other == (said if degrees.tp > 1 else f"RuntimeError: {call} failed on rank 1: {said}", True)


def test_a_model_that_fails_in_the_middle(ranks2: Ranks) -> None:
    for first, second in ranks2.run(steps.failing_model):
        assert first.startswith("IndexError: ")
        assert second.startswith("RuntimeError: model: an earlier call failed in the middle (IndexError: ")
        assert second.endswith("start again, from a checkpoint")


@LAYOUTS
@pytest.mark.parametrize("names", [[], ["table"], ["vocab_out"], ["stack.1.mlp"]], ids=["all", "end", "start", "most"])
def test_frozen_parts(ranks2: Ranks, degrees: Degrees, names: list[str]) -> None:
    expected_loss, expected_norm = steps.frozen_plain(names)
    found = ranks2.run(steps.frozen, degrees, names)
    for loss, norm, _ in found:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    trained = {name for _, _, some in found for name in some}
    assert all(any(name.startswith(f"{one}.") for one in names) for name in trained)
    assert bool(trained) == bool(names)


@pytest.mark.slow  # processes of its own, which end
@pytest.mark.parametrize(("degrees", "first"), [(FSDP, False), (TP, True), (PP, False)], ids=["fsdp", "tp", "pp"])
def test_a_model_that_fails_on_one_rank(degrees: Degrees, first: bool, tmp_path: Path) -> None:
    ranks = Ranks(2)
    try:
        with pytest.raises(AssertionError, match="the process died"):
            ranks.run(steps.failing_forward, degrees, str(tmp_path), first)
    finally:
        ranks.close()
    assert (tmp_path / "1").read_text() == "ValueError: no forward today"
    assert (
        tmp_path / "0"
    ).read_text() == "RuntimeError: forward_backward failed on rank 1: ValueError: no forward today"


def test_a_rank_that_scores_nothing(ranks2: Ranks) -> None:
    assert max(ranks2.run(steps.constant_loss, FSDP)) < 1e-6
