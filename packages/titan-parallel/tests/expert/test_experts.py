"""Mixtures of experts, spread over ranks and split by tensor parallelism, train as in one process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import Shard

import parallel_experts as cases
from parallel_cases import ROWS, SEQ
from parity import assert_same_training
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions
from titan_parallel.expert.experts import shard_dim


@pytest.fixture(scope="module")
def alone() -> dict:
    return cases.reference()


@pytest.fixture(scope="module")
def together() -> dict:
    return cases.reference(gathered=True)


def without(*names: str) -> dict:
    return {"tensor": {name: style for name, style in cases.plan()["tensor"].items() if name not in names}}


def styled(name: str, style: str) -> dict:
    return {"tensor": {**cases.plan()["tensor"], name: style}}


COMPILED = ParallelOptions(compile_blocks=True, compile_backend="aot_eager")


SAC = ParallelOptions(activation_checkpointing="selective")
AC = ParallelOptions(activation_checkpointing="full")
APART = ParallelOptions(sequence_parallel=False, reshard_after_forward="never")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(ep=2), SAC),
        (Degrees(tp=2), APART),
        pytest.param(Degrees(tp=2), SAC, marks=pytest.mark.nightly),
        pytest.param(Degrees(ep=2), AC, marks=pytest.mark.nightly),
    ],
    ids=["ep-sac", "tp-no-sp-no-reshard", "tp-sac", "ep-ac"],
)
def test_two_processes_with_options(ranks2: Ranks, alone: dict, degrees: Degrees, options: ParallelOptions) -> None:
    assert_same_training(ranks2.run(cases.train, degrees, options), alone)


@pytest.mark.parametrize(
    "degrees",
    [Degrees(ep=2), Degrees(), pytest.param(Degrees(tp=2), marks=pytest.mark.slow)],
    ids=["ep", "fsdp", "tp"],
)
def test_two_processes_accumulating(ranks2: Ranks, alone: dict, degrees: Degrees) -> None:
    assert_same_training(ranks2.run(cases.train, degrees, None, 2), alone)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("degrees", "checkpointing"), [(Degrees(ep=2), "selective"), (Degrees(tp=2), "full")], ids=["ep-sac", "tp-ac"]
)
def test_two_processes_compiled(ranks2: Ranks, together: dict, degrees: Degrees, checkpointing: str) -> None:
    options = replace(COMPILED, activation_checkpointing=checkpointing)
    assert_same_training(ranks2.run(cases.train, degrees, options, 1, True), together)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        pytest.param(Degrees(ep=4), None, marks=pytest.mark.nightly),
        (Degrees(ep=2, tp=2), ParallelOptions(sequence_parallel=False, activation_checkpointing="full")),
        pytest.param(Degrees(tp=4), None, marks=pytest.mark.nightly),
    ],
    ids=["ep4", "ep-tp-ac", "tp4"],
)
def test_four_processes(ranks4: Ranks, alone: dict, degrees: Degrees, options: ParallelOptions | None) -> None:
    assert_same_training(ranks4.run(cases.train, degrees, options), alone)


@pytest.mark.nightly
def test_four_processes_compiled(ranks4: Ranks, together: dict) -> None:
    assert_same_training(ranks4.run(cases.train, Degrees(ep=2, tp=2), COMPILED, 1, True, timeout=180.0), together)


@pytest.mark.slow
def test_bf16_stays_near(ranks2: Ranks, alone: dict) -> None:
    for degrees in (Degrees(ep=2), Degrees(tp=2)):
        for result in ranks2.run(cases.train, degrees, ParallelOptions(param_dtype="bfloat16")):
            assert result["losses"] == pytest.approx(alone["losses"], abs=5e-2)
            assert result["losses"] != alone["losses"]  # it did compute in bf16


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees", [Degrees(ep=4), pytest.param(Degrees(ep=2, tp=2), marks=pytest.mark.nightly)], ids=["ep4", "ep-tp"]
)
def test_all_tokens_to_one_rank(ranks4: Ranks, degrees: Degrees) -> None:
    assert_same_training(ranks4.run(cases.train, degrees, None, 1, False, True), cases.reference(one_expert=True))
    each = cases.EXPERTS // degrees.ep
    for rank, (seen, zero) in enumerate(ranks4.run(cases.idle_ranks, degrees)):
        busy = rank < degrees.tp  # has the first experts, to which all tokens go
        for counts in seen:
            assert len(counts) == each
            assert sum(counts) == (cases.CHOSEN * ROWS * SEQ if busy else 1)  # one that is made up
        assert not any(zero) if busy else all(zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchange_of_any_counts(ranks4: Ranks, dtype: torch.dtype) -> None:
    for seed in range(5):
        answers = ranks4.run(cases.exchange, dtype, seed)
        assert max(off for off, _ in answers) <= (1e-6 if dtype == torch.float32 else 1e-2)
        assert answers[-1][1] == [1]  # a row that is made up, since nobody had any


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_rows_sent(ranks2: Ranks, checkpointing: str) -> None:
    layers = 2
    answers = ranks2.run(cases.traffic, checkpointing)
    for (rows, needed, messages), (_, of_the_other, _) in zip(answers, answers[::-1], strict=True):
        # Rows go to the other rank and results come back from there; of its rows it is the other way round.
        ways = list(zip(needed[:layers], of_the_other[:layers], strict=True))
        again = ways[::-1] if checkpointing == "full" else []  # `selective` keeps what was received
        backward = [way for pair in zip(again, ways[::-1], strict=True) for way in pair] if again else ways[::-1]
        assert rows == [n for way in [*ways, *backward] for n in way]
        assert all(rows)
        # Counts go ahead of the rows, once a layer, and again when it is computed again.
        assert messages == layers * (2 if checkpointing == "full" else 1)


@pytest.mark.slow
def test_layouts(ranks4: Ranks) -> None:
    for degrees, dims, placements in [
        (Degrees(ep=2), "expert_fsdp ep", {"wide": ["S(1)", "S(0)"], "narrow_bias": ["S(1)", "S(0)"]}),
        (Degrees(ep=2, dp_replicate=2), "dp_replicate expert_fsdp ep", {"narrow": ["R", "S(1)", "S(0)"]}),
        (
            Degrees(ep=2, tp=2),
            "expert_fsdp ep tp",
            {"wide": ["S(2)", "S(0)", "S(1)"], "narrow": ["S(1)", "S(0)", "S(2)"]},
        ),
        (
            Degrees(tp=2),
            "fsdp tp",
            {"wide": ["S(0)", "S(1)"], "narrow": ["S(0)", "S(2)"], "narrow_bias": ["S(0)", "R"]},
        ),
    ]:
        for found in ranks4.run(cases.layouts, degrees):
            for key, expected in placements.items():
                mesh, has, _, _ = found[f"stack.0.mixture.experts.{key}"]
                assert (mesh, has) == (dims, expected)
            assert all(like_its_parameter for _, _, _, like_its_parameter in found.values())


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(ep=2, tp=2),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (Degrees(ep=4), Degrees(ep=2))),
        pytest.param(Degrees(ep=2, dp_replicate=2), marks=pytest.mark.slow),
    ],
    ids=["ep-tp", "ep4", "ep-fsdp", "ep-ddp"],
)
def test_clipping_over_mixed_meshes(ranks4: Ranks, degrees: Degrees) -> None:
    for expected, found, off, with_a_hole in ranks4.run(cases.norms_with_a_hole, degrees):
        assert found == pytest.approx(expected, rel=1e-5)
        assert off < 1e-6
        assert math.isnan(with_a_hole)


@pytest.mark.parametrize(
    ("degrees", "changed", "says"),
    [
        (Degrees(ep=2), {"experts": []}, "ep=2 requires plan['experts']"),
        (
            Degrees(ep=2),
            {"n_experts": 9},
            "ep 2 does not divide the number of experts, 9; these degrees would: [1, 3, 9]",
        ),
        (Degrees(ep=2), {"n_experts": 4}, "wide [8, 24, 32] has 8 in dim 0, the plan's n_experts is 4"),
        (
            Degrees(ep=2),
            {"experts": ["stack.*.mixture.beside"], "n_experts": 24},
            "beside.2.bias [32] has 32 in dim 0, the plan's",
        ),
        (
            Degrees(tp=2),
            {"tensor": {"stack.*.mixture": "gather"}},
            "no module in plan['tensor'] has the style 'mixture'",
        ),
        (Degrees(tp=2), without("stack.*.mixture.gate"), "covers stack.0.mixture.gate.matrix, stack.1.mixture.gate"),
        (Degrees(tp=2), styled("stack.*.mixture.scale", "local"), "scale' [32] cannot be 'local'"),
        (
            Degrees(tp=2),
            styled("stack.*.mixture.scale", "rowwise"),
            "scale' [32] cannot be 'rowwise'. In a mixture 'colwise' and",
        ),
        (
            Degrees(tp=2),
            styled("stack.*.norm1", "router"),
            "'stack.0.norm1' is a 'router', but not inside a 'mixture'",
        ),
    ],
    ids=["no-experts", "number", "stated", "shapes", "no-mixture", "router", "kind", "parameter", "outside"],
)
def test_refusals(ranks2: Ranks, degrees: Degrees, changed: dict, says: str) -> None:
    for message in ranks2.run(cases.refusal, degrees, changed):
        assert says in message, message


def test_dim_that_fsdp_shards() -> None:
    ep, tp = Shard(0), Shard(2)
    assert shard_dim([4, 6, 8], (ep,), 2) == 1
    assert shard_dim([4, 6, 8], (ep,), 4) == 2  # 6 does not divide
    assert shard_dim([4, 6, 8], (ep, Shard(1)), 3) == 1  # the only one, though it is split already
    assert shard_dim([4, 6, 8], (ep, tp), 4) == 0
    assert shard_dim([4, 6, 8], (ep, tp), 5) is None
