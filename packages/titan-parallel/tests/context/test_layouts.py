"""Context parallelism: every kind, in every product, trains to the losses of one process."""

from __future__ import annotations

import pytest
import torch

import parallel_context as cases
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions

KINDS = ["allgather", "ring", "ulysses"]
LONGER = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "ring"]
AT_NIGHT = [pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS if kind != "ring"]
LAYOUTS = {
    "cp4": Degrees(cp=4),
    "cp2-tp2": Degrees(cp=2, tp=2),
    "cp2-fsdp2": Degrees(cp=2, dp_shard=2),
    "cp2-ddp2": Degrees(cp=2, dp_replicate=2, dp_shard=1),
}
WAYS = {
    "plain": {},
    "ac": {"activation_checkpointing": "full"},
    "compile": {"compile_blocks": True, "compile_backend": "aot_eager"},
}


@pytest.fixture(scope="module")
def masked() -> dict:
    return cases.reference()


@pytest.fixture(scope="module")
def unmasked() -> dict:
    return cases.reference(masked=False)


def test_losses_move_and_documents_count(masked: dict, unmasked: dict) -> None:
    # The other tests compare curves: they must be curves, and not the same ones.
    assert masked["losses"][0] - masked["losses"][-1] > 0.05
    assert min(masked["norms"]) > cases.MAX_NORM
    assert abs(masked["losses"][-1] - unmasked["losses"][-1]) > 1e-3


@pytest.mark.parametrize("way", ["plain", "ac"])
@pytest.mark.parametrize("kind", KINDS)
def test_two(ranks2: Ranks, masked: dict, kind: str, way: str) -> None:
    assert_same_training(ranks2.run(cases.train, Degrees(cp=2), ParallelOptions(context=kind, **WAYS[way])), masked)


@pytest.mark.parametrize("kind", KINDS)
def test_without_documents(ranks2: Ranks, unmasked: dict, kind: str) -> None:
    assert_same_training(ranks2.run(cases.train, Degrees(cp=2), ParallelOptions(context=kind), False), unmasked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", *AT_NIGHT])
def test_accumulating_with_selective_checkpointing(ranks2: Ranks, masked: dict, kind: str) -> None:
    options = ParallelOptions(context=kind, activation_checkpointing="selective")
    assert_same_training(ranks2.run(cases.train, Degrees(cp=2), options, True, 4), masked)


@pytest.mark.parametrize("kind", ["ring", *LONGER])
def test_bf16_stays_near(ranks2: Ranks, masked: dict, kind: str) -> None:
    for result in ranks2.run(cases.train, Degrees(cp=2), ParallelOptions(context=kind, param_dtype="bfloat16")):
        assert result["losses"] == pytest.approx(masked["losses"], abs=5e-2)
        assert result["losses"] != masked["losses"]


# The matrix has every kind in most of these layouts, with another model.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "layout", "way"),
    [
        ("allgather", "cp4", "compile"),
        ("ring", "cp2-tp2", "plain"),
        ("ulysses", "cp2-fsdp2", "ac"),
        ("allgather", "cp2-ddp2", "plain"),
    ],
)
def test_four(ranks4: Ranks, masked: dict, kind: str, layout: str, way: str) -> None:
    assert_same_training(ranks4.run(cases.train, LAYOUTS[layout], ParallelOptions(context=kind, **WAYS[way])), masked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", *AT_NIGHT])
def test_tensor_parallel_without_sequence_parallel(ranks4: Ranks, masked: dict, kind: str) -> None:
    # Compiled and checkpointed at once, as one would train.
    options = ParallelOptions(context=kind, sequence_parallel=False, **WAYS["ac"], **WAYS["compile"])
    assert_same_training(ranks4.run(cases.train, LAYOUTS["cp2-tp2"], options), masked)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(ranks2: Ranks, masked: dict, kind: str) -> None:
    options = ParallelOptions(context=kind, compile_blocks=True, activation_checkpointing="selective")
    assert_same_training(ranks2.run(cases.train, Degrees(cp=2), options, timeout=400.0), masked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_predict(ranks1: Ranks, ranks4: Ranks, kind: str) -> None:
    total, logits, again = ranks1.run(cases.evaluate_and_predict, Degrees(), kind)[0]
    assert torch.equal(logits, again)
    for layout in ("cp4", "cp2-tp2", "cp2-fsdp2"):
        for result in ranks4.run(cases.evaluate_and_predict, LAYOUTS[layout], kind):
            assert result[0] == pytest.approx(total, rel=1e-5)
            torch.testing.assert_close(result[1], logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result[2], logits, rtol=1e-5, atol=1e-5)
