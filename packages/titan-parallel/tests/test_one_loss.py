"""A model with biases, replicated norms and a head norm, unlike the matrix's, trains as with torch in one process."""

from __future__ import annotations

import pytest
import torch

import parallel_cases as cases
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions


def test_losses_move(plain: dict) -> None:
    # The other tests compare curves: they must be curves.
    assert plain["losses"][0] - plain["losses"][-1] > 0.05
    assert min(plain["norms"]) > cases.MAX_NORM  # clipping acts


@pytest.mark.parametrize(
    "options",
    [
        ParallelOptions(),
        ParallelOptions(activation_checkpointing="full"),
        ParallelOptions(activation_checkpointing="selective"),
        pytest.param(ParallelOptions(compile_blocks=True, compile_backend="aot_eager"), marks=pytest.mark.nightly),
    ],
    ids=["plain", "ac-full", "ac-selective", "compile"],
)
def test_one_process(ranks1: Ranks, plain: dict, options: ParallelOptions) -> None:
    assert_same_training(ranks1.run(cases.train, Degrees(), options), plain)


@pytest.mark.nightly
def test_tensor_parallel_accumulating(ranks2: Ranks, plain: dict) -> None:
    assert_same_training(ranks2.run(cases.train, Degrees(tp=2), None, False, 4), plain)


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(tp=2), ParallelOptions(sequence_parallel=False)),
        (Degrees(), ParallelOptions(reshard_after_forward="never")),
        pytest.param(Degrees(tp=2), ParallelOptions(activation_checkpointing="selective"), marks=pytest.mark.slow),
    ],
    ids=["tp-no-sp", "fsdp-no-reshard", "tp-sac"],
)
def test_two_processes_with_options(ranks2: Ranks, plain: dict, degrees: Degrees, options: ParallelOptions) -> None:
    assert_same_training(ranks2.run(cases.train, degrees, options), plain)


@pytest.mark.nightly
def test_fsdp_and_tensor_parallel(ranks4: Ranks, plain: dict) -> None:
    assert_same_training(ranks4.run(cases.train, Degrees(tp=2)), plain)


@pytest.mark.nightly
def test_hsdp_accumulating(ranks4: Ranks, plain: dict) -> None:
    assert_same_training(ranks4.run(cases.train, Degrees(dp_replicate=2), None, False, 2), plain)


@pytest.mark.nightly
def test_tied_weights(ranks4: Ranks) -> None:
    assert_same_training(ranks4.run(cases.train, Degrees(tp=2), None, True), cases.reference(tied=True))


@pytest.mark.slow
def test_bf16_stays_near(ranks2: Ranks, ranks1: Ranks, plain: dict) -> None:
    for results in (
        ranks1.run(cases.train, Degrees(), cases.bf16_options()),
        ranks2.run(cases.train, Degrees(tp=2), cases.bf16_options()),
    ):
        for result in results:
            assert result["losses"] == pytest.approx(plain["losses"], abs=5e-2)
            assert result["losses"] != plain["losses"]  # it did compute in bf16
            assert all(w.dtype == torch.float32 for w in result["weights"].values())


@pytest.mark.slow
def test_inductor(ranks2: Ranks, plain: dict) -> None:
    options = ParallelOptions(compile_blocks=True, activation_checkpointing="selective")
    assert_same_training(ranks2.run(cases.train, Degrees(tp=2), options, timeout=400.0), plain)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_meta(ranks1: Ranks, ranks4: Ranks, tied: bool) -> None:
    answers = [ranks1.run(cases.fill_from_meta, Degrees(), tied)[0]]
    for degrees in (Degrees(), Degrees(tp=2)):
        answers += ranks4.run(cases.fill_from_meta, degrees, tied)
    plain_net = cases.build(tied)
    names, state_names, _, _ = answers[0]
    assert names == [name for name, _ in plain_net.named_parameters()]
    assert set(state_names) == {name for name in plain_net.state_dict() if not (tied and name == "vocab_out.weight")}
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][3] is tied


@pytest.mark.slow
def test_evaluate_and_predict(ranks1: Ranks, ranks4: Ranks) -> None:
    expected_loss, expected_logits, training = ranks1.run(cases.evaluate_and_predict, Degrees())[0]
    assert training
    for degrees in (Degrees(), Degrees(tp=2)):
        for loss, logits, training in ranks4.run(cases.evaluate_and_predict, degrees):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            torch.testing.assert_close(logits, expected_logits)
            assert training


def test_state_round_trip(ranks4: Ranks) -> None:
    assert all(ranks4.run(cases.state_round_trip, Degrees(tp=2)))
