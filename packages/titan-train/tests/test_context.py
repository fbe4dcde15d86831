"""Context parallelism of titan-model's decoder, by what its plan says about attention, sequence and positions."""

from __future__ import annotations

import pytest
import torch

import train_context as cases
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions

KINDS = ["allgather", "ring", "ulysses"]


@pytest.fixture(scope="module", params=cases.FAMILIES)
def single(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.param, cases.reference(request.param)


def same(group: Ranks, single: tuple[str, dict], degrees: Degrees, options: ParallelOptions) -> None:
    family, expected = single
    assert expected["losses"][0] - expected["losses"][-1] > 0.05  # a curve to follow
    assert_same_training(group.run(cases.train, family, degrees, options), expected)


@pytest.mark.parametrize(
    "kind", ["ring", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "ring")]
)
def test_two_processes(ranks2: Ranks, single: tuple[str, dict], kind: str) -> None:
    same(ranks2, single, Degrees(cp=2), ParallelOptions(context=kind))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("allgather", Degrees(cp=2, tp=2)),
        ("ulysses", Degrees(cp=2, dp_shard=2)),
    ],
    ids=["allgather-tp", "ulysses-fsdp"],
)
def test_four_processes(ranks4: Ranks, single: tuple[str, dict], kind: str, degrees: Degrees) -> None:
    same(ranks4, single, degrees, ParallelOptions(context=kind))


@pytest.mark.nightly
def test_compiled(ranks4: Ranks) -> None:
    options = ParallelOptions(
        context="ring", compile_blocks=True, compile_backend="aot_eager", activation_checkpointing="selective"
    )
    same(ranks4, ("qwen3", cases.reference("qwen3")), Degrees(cp=2, tp=2), options)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(ranks2: Ranks, kind: str) -> None:
    expected = cases.build("llama")(cases.batch(0)["tokens"])
    for found in ranks2.run(cases.logits, "llama", Degrees(cp=2), ParallelOptions(context=kind)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
