"""Pipelines train to the losses, norms and weights of one process: every schedule, with every other parallelism."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import parallel_pipeline as cases
from parallel_cases import MAX_NORM, SEQ, bf16_options
from parallel_pipeline import Case
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import SCHEDULES, Degrees, ParallelOptions, PipelineOptions


def at_night(*values: object) -> list:
    """Mark values of a parameter as those of the nightly set."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def on(schedule: str, degrees: Degrees | None = None, **more: object) -> Case:
    return Case(degrees or Degrees(pp=2), PipelineOptions(schedule=schedule), **more)  # type: ignore[arg-type]


def test_losses_move() -> None:
    for tied in (False, True):
        expected = cases.reference(tied)
        assert max(expected["losses"]) - min(expected["losses"]) > 0.05
        assert min(expected["norms"]) > MAX_NORM  # clipping acts


@pytest.mark.parametrize(
    "schedule", [name if name in ("1F1B", "ZBVZeroBubble", "DualPipeV") else at_night(name)[0] for name in SCHEDULES]
)
def test_schedules(ranks2: Ranks, schedule: str) -> None:
    for case in (on(schedule, wraps=True, looks=True), on(schedule, tied=True)):
        assert_same_training(ranks2.run(cases.train, case), case.expected(), stages=True)


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "Interleaved1F1B"])
def test_four_stages_wide_uneven(ranks4: Ranks, schedule: str) -> None:
    case = on(schedule, Degrees(pp=4), tied=True, layers=9)
    assert_same_training(ranks4.run(cases.train, case), case.expected(), stages=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", *at_night("DualPipeV", "InterleavedZeroBubble")])
def test_with_fsdp(ranks4: Ranks, schedule: str) -> None:
    case = on(schedule, tied=True, looks=True)
    assert_same_training(ranks4.run(cases.train, case), case.expected(), stages=True)


@pytest.mark.nightly
def test_with_replicas(ranks4: Ranks) -> None:
    case = on("Interleaved1F1B", Degrees(pp=2, dp_replicate=2))
    assert_same_training(ranks4.run(cases.train, case), case.expected(), stages=True)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("schedule", "sequence_parallel"),
    [("InterleavedZeroBubble", False), ("DualPipeV", True)],
    ids=["InterleavedZeroBubble-no-sp", "DualPipeV-sp"],
)
def test_with_tensor_parallelism(ranks4: Ranks, schedule: str, sequence_parallel: bool) -> None:
    options = ParallelOptions(sequence_parallel=sequence_parallel)
    case = on(schedule, Degrees(pp=2, tp=2), tied=True, wraps=True, looks=sequence_parallel, options=options)
    assert_same_training(ranks4.run(cases.train, case), case.expected(), stages=True)


@pytest.mark.nightly
def test_with_fsdp_and_tensor_parallelism(ranks8: Ranks) -> None:
    case = on("ZBVZeroBubble", Degrees(pp=2, tp=2), tied=True)
    assert_same_training(ranks8.run(cases.train, case, timeout=400.0), case.expected(), stages=True)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    [
        ParallelOptions(reshard_after_forward="always"),
        ParallelOptions(activation_checkpointing="selective"),
        ParallelOptions(activation_checkpointing="full"),
        ParallelOptions(compile_blocks=True, compile_backend="aot_eager"),
    ],
    ids=["reshard", "ac-selective", "ac-full", "compile"],
)
def test_with_options(ranks4: Ranks, options: ParallelOptions) -> None:
    schedule = "Interleaved1F1B" if options.reshard_after_forward == "always" else "ZBVZeroBubble"
    case = on(schedule, options=options)
    assert_same_training(ranks4.run(cases.train, case, timeout=200.0), case.expected(), stages=True)


@pytest.mark.slow
def test_bf16_stays_near(ranks2: Ranks) -> None:
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        case = on(schedule, options=bf16_options())
        for result in ranks2.run(cases.train, case):
            assert result["losses"] == pytest.approx(case.expected()["losses"], abs=5e-2)
            assert result["losses"] != case.expected()["losses"]  # it did compute in bf16
            assert all(w.dtype == torch.float32 for w in result["weights"].values())


def run_in_halves(group: Ranks, case: Case) -> None:
    stages = {index: splits for found in group.run(cases.halves, case) for index, splits in found.items()}
    assert stages == dict.fromkeys(range(4), True)


@pytest.mark.slow
def test_backward_is_run_in_halves_on_four(ranks4: Ranks) -> None:
    run_in_halves(ranks4, on("ZBVZeroBubble"))
    run_in_halves(ranks4, on("ZBVZeroBubble", Degrees(pp=2, tp=2)))


def test_backward_is_run_in_halves(ranks2: Ranks) -> None:
    run_in_halves(ranks2, on("InterleavedZeroBubble"))
    run_in_halves(ranks2, on("ZBVZeroBubble", tied=True))
    compiled = on("ZBVZeroBubble", options=ParallelOptions(compile_blocks=True, compile_backend="eager"))
    assert ranks2.run(cases.halves, compiled) == [{0: False, 3: False}, {1: False, 2: False}]


def test_results_are_sent_when_they_are_there(ranks2: Ranks) -> None:
    # torch puts a forward and a backward into one action in this schedule, and would send what they give after both.
    for actions in ranks2.run(cases.actions, on("DualPipeV")):
        sent = [(one, then) for one, then in pairwise(actions) if "SEND" in then and "WAIT" not in then]
        assert len(sent) == 8
        assert all(then[:2] == one[:1] + "S" and then[-1] == one[-1] for one, then in sent), actions


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("kind", ["twice", "turned", "once"])
def test_odd_models(ranks2: Ranks, schedule: str, kind: str) -> None:
    expected = cases.odd_gradients(kind, "")
    found = {name: grad for result in ranks2.run(cases.odd_gradients, kind, schedule) for name, grad in result.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_stages_exchange_the_hidden_state(ranks2: Ranks) -> None:
    for result in ranks2.run(cases.sent_shapes, on("1F1B")):
        assert result == [[cases.ROWS // 4, SEQ, cases.DIM]] * 4


@pytest.mark.slow
def test_stages_exchange_their_share_of_the_hidden_state(ranks4: Ranks) -> None:
    rows = cases.ROWS // 4
    for result in ranks4.run(cases.sent_shapes, on("1F1B", Degrees(pp=2, tp=2))):
        assert result == [[rows, SEQ // 2, cases.DIM]] * 4


@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV", *at_night("ZBVZeroBubble")])
def test_evaluate_and_predict(ranks2: Ranks, ranks4: Ranks, schedule: str) -> None:
    net = cases.build(True, 4)
    tokens, labels = cases.batch(0)
    with torch.no_grad():
        logits = net(tokens, document_ids=cases.documents(0))
        expected = float(cases.summed_loss(logits, labels))
    case = on(schedule, tied=True, count=1)  # less than some schedules take to train
    for group in (ranks2, ranks4):
        for loss, found, training in group.run(cases.evaluate_and_predict, case):
            assert loss == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(found, logits)
            assert all(training)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "tied"), [("ZBVZeroBubble", True), ("1F1B", False)], ids=["tied", "untied"])
def test_from_meta(ranks2: Ranks, ranks4: Ranks, schedule: str, tied: bool) -> None:
    net = cases.build(tied, 4)
    expected = net.state_dict()
    if tied:
        del expected["vocab_out.weight"]
    logits = net(cases.batch(0)[0], document_ids=cases.documents(0)).detach()
    for group, degrees in ((ranks2, Degrees(pp=2)), (ranks4, Degrees(pp=2)), (ranks4, Degrees(pp=2, tp=2))):
        seen = {}
        for parameters, state, found in group.run(cases.fill_from_meta, on(schedule, degrees, tied=tied)):
            torch.testing.assert_close(found, logits)
            assert parameters.keys() == state.keys() - {"scale"}
            seen |= state
        assert seen.keys() == expected.keys()
        for name, value in seen.items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("schedule", ["1F1B", *at_night("ZBVZeroBubble")])
def test_gradients_add_up_over_calls(ranks4: Ranks, schedule: str) -> None:
    case = on(schedule, tied=True)
    for once, twice in zip(*(ranks4.run(cases.gradients, case, calls) for calls in (1, 2)), strict=True):
        assert once.keys() == twice.keys()
        for name, gradient in once.items():
            torch.testing.assert_close(twice[name], 2 * gradient)


def test_lengths_that_change(ranks4: Ranks) -> None:
    # Ranks that gather weights together look at new shapes together, whichever of them has one.
    answers = ranks4.run(cases.other_shapes, on("1F1B", count=2))
    assert all(answer == pytest.approx(answers[0], rel=1e-6) for answer in answers)
    assert len(set(answers[0])) == 4


def test_explicit_split(ranks2: Ranks) -> None:
    pipeline = PipelineOptions(split=("stack.1",))
    case = Case(Degrees(pp=2), pipeline, tied=True)
    results = ranks2.run(cases.train, case)
    assert_same_training(results, case.expected(), stages=True)
    blocks = [{name.split(".")[1] for name in r["weights"] if name.startswith("stack.")} for r in results]
    assert blocks == [{"0"}, {"1", "2", "3"}]


@pytest.mark.parametrize("kind", ["v", "loop"])
def test_schedule_from_a_file(ranks2: Ranks, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "order.csv"
    path.write_text(FILES[kind])
    case = Case(Degrees(pp=2), PipelineOptions(schedule=str(path)), tied=True, looks=True, count=2)
    assert_same_training(ranks2.run(cases.train, case), case.expected(), stages=True)


FILES = {
    "loop": "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n",
    "v": "0F0,0F1,,3F0,3I0,3W0,3F1,3B1,0I0,0W0,0B1\n,1F0,2F0,1F1,2F1,,2I0,1I0,2W0,1W0,2B1,1B1\n",
}
NO = ParallelOptions()


@pytest.mark.parametrize(
    ("kind", "changed", "options", "count", "says"),
    [
        ("stray", {}, NO, 4, "LayoutError: pp above 1: these parameters are in no module .*: shift$"),
        ("", {"blocks": []}, NO, 4, r"LayoutError: pp above 1 requires plan\['blocks'\]"),
        ("second", {}, NO, 4, "LayoutError: pipeline stages exchange only the first argument of their blocks"),
        (
            "shrinks",
            {},
            NO,
            4,
            r"LayoutError: blocks must keep .* float32 \[2, 16, 32\] becomes float32 \[2, 15, 32\]",
        ),
        ("broken", {}, NO, 4, "(RuntimeError: (forward_backward failed on rank .: )?)?ValueError: no forward today$"),
        ("late", {}, NO, 4, "(RuntimeError: (forward_backward failed on rank .: )?)?ValueError: no head today$"),
        ("skip", {}, NO, 4, "LayoutError: .* but a later stage also needs the output of places, table;"),
        ("kept", {}, NO, 4, "LayoutError: .* but the loss depends on the blocks in another way too"),
        (
            "again",
            {},
            NO,
            4,
            r"LayoutError: .* one module under two names, which stages cannot share: stack.2 is stack.0",
        ),
        ("shapes", {}, NO, 4, r"ValueError: .* float32 \[2, 16, 32\], float32 \[2, 4, 32\]; pad them"),
        ("", {}, NO, 1, "LayoutError: pipeline schedule 1F1B on 2 ranks takes at least as many as ranks, 2, but there"),
        (
            "",
            {},
            ParallelOptions(reshard_after_forward="always", pipeline=PipelineOptions(schedule="DualPipeV")),
            4,
            "LayoutError: pipeline schedule DualPipeV computes gradients of weights long after",
        ),
        (
            "",
            {},
            ParallelOptions(pipeline=PipelineOptions(schedule="LoopedBFS", stages_per_rank=3)),
            4,
            r"LayoutError: there are 6 pipeline stages \(pp 2 x 3 per rank\), but only 4 blocks",
        ),
        (
            "",
            {},
            ParallelOptions(pipeline=PipelineOptions(split=("stack.9",))),
            4,
            r"LayoutError: pipeline.split: not the names of blocks: stack.9 \(nearest to the first: stack\.",
        ),
    ],
    ids=[
        "stray",
        "no-blocks",
        "second",
        "shrinks",
        "broken",
        "late",
        "skip",
        "kept",
        "again",
        "shapes",
        "few",
        "reshard",
        "stages",
        "split",
    ],
)
def test_refusals(ranks2: Ranks, kind: str, changed: dict, options: ParallelOptions, count: int, says: str) -> None:
    for message in ranks2.run(cases.refusal, kind, changed, options, count):
        assert re.match(says, message), message
