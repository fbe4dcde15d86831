"""Mixtures of experts, spread over ranks and split by tensor parallelism, train as in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

import parallel_experts as cases
from parallel_group import Group
from test_parallel_one_loss import same
from titan_parallel import Degrees, ParallelOptions


@pytest.fixture(scope="module")
def alone() -> dict:
    return cases.reference()


@pytest.fixture(scope="module")
def together() -> dict:
    return cases.reference(grouped=True)


COMPILED = ParallelOptions(compile_blocks=True, compile_backend="aot_eager")


@pytest.mark.parametrize("degrees", [Degrees(ep=2), Degrees(tp=2), Degrees()], ids=["ep", "tp", "fsdp"])
def test_two_processes(two: Group, alone: dict, degrees: Degrees) -> None:
    same(two.run(cases.train, degrees), alone)


@pytest.mark.parametrize("degrees", [Degrees(ep=2), Degrees(tp=2)], ids=["ep", "tp"])
@pytest.mark.parametrize(
    "options",
    [
        ParallelOptions(activation_checkpointing="full"),
        ParallelOptions(activation_checkpointing="selective"),
        ParallelOptions(sequence_parallel=False, reshard_after_forward=False),
    ],
    ids=["ac", "sac", "no-sp-no-reshard"],
)
def test_two_processes_with_options(two: Group, alone: dict, degrees: Degrees, options: ParallelOptions) -> None:
    same(two.run(cases.train, degrees, options), alone)


@pytest.mark.parametrize("degrees", [Degrees(ep=2), Degrees(tp=2)], ids=["ep", "tp"])
def test_two_processes_accumulating(two: Group, alone: dict, degrees: Degrees) -> None:
    same(two.run(cases.train, degrees, None, 2), alone)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("degrees", [Degrees(ep=2), Degrees(tp=2)], ids=["ep", "tp"])
def test_two_processes_compiled(two: Group, together: dict, degrees: Degrees, checkpointing: str) -> None:
    options = replace(COMPILED, activation_checkpointing=checkpointing)
    same(two.run(cases.train, degrees, options, 1, True), together)


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(ep=4), None),
        (Degrees(ep=2), None),
        (Degrees(ep=2, dp_replicate=2), None),
        (Degrees(ep=2, tp=2), None),
        (Degrees(ep=2, tp=2), ParallelOptions(sequence_parallel=False, activation_checkpointing="full")),
        (Degrees(tp=4), None),
        (Degrees(tp=2), None),
    ],
    ids=["ep4", "ep-fsdp", "ep-ddp", "ep-tp", "ep-tp-ac", "tp4", "tp-fsdp"],
)
def test_four_processes(four: Group, alone: dict, degrees: Degrees, options: ParallelOptions | None) -> None:
    same(four.run(cases.train, degrees, options), alone)
