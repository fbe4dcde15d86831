"""Models as other people write them: exact, or refused with what to change."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import parallel_foreign as foreign
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions

FSDP, REPLICAS, TP, PP = Degrees(), Degrees(dp_replicate=2), Degrees(tp=2), Degrees(pp=2)
DATA = pytest.mark.parametrize(
    "degrees", [pytest.param(FSDP, id="fsdp"), pytest.param(REPLICAS, id="replicas", marks=pytest.mark.slow)]
)
SUMS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


@pytest.mark.skipif(not SUMS_UNUSED, reason="torch 2.15 and later")
@DATA
@pytest.mark.parametrize("used", [((0, 1), (1, 2)), ((0,), (1, 2, 3)), ((0, 1), (2,))], ids=["equal", "more", "fewer"])
@pytest.mark.parametrize("reduces_once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_that_use_different_parameters(ranks2: Ranks, degrees: Degrees, used: tuple, reduces_once: bool) -> None:
    options = ParallelOptions(reduce_every_microbatch=not reduces_once)
    assert max(ranks2.run(foreign.other_experts, used, degrees, options, True)) < 1e-6


@pytest.mark.skipif(not SUMS_UNUSED, reason="switched off in the test")
def test_ranks_that_use_different_parameters_before_torch_2_15(ranks2: Ranks) -> None:
    for message in ranks2.run(foreign.other_experts, ((0, 1), (1, 2)), FSDP, ParallelOptions(), False):
        assert message.startswith("LayoutError: ranks used different parameters in this step, whose gradients this ")
        assert "install torch 2.15 or later" in message


@DATA
@pytest.mark.parametrize(("last", "met"), [(False, "blocks.0"), (True, "the end of the model's forward")])
def test_a_unit_that_one_rank_does_not_call(ranks2: Ranks, degrees: Degrees, last: bool, met: str) -> None:
    for message in ranks2.run(foreign.missing_unit, last, degrees):
        assert message.startswith(f"LayoutError: FSDP: rank 0 came to tower where rank 1 came to {met}; ")
        assert message.endswith("or leave it out of `blocks`, `before` and `after`")


@pytest.mark.parametrize("options", [ParallelOptions(), ParallelOptions(cpu_offload=True)], ids=["device", "offloaded"])
def test_buffers_that_no_file_contains(ranks2: Ranks, options: ParallelOptions) -> None:
    filled = {"rope.table": [1, 2, 3, 4], "rope.index": [0, 1, 2, 3], "kept": [2, 2, 2], "scale": [1, 1]}
    for kind in ("given", "reset"):
        assert ranks2.run(foreign.materialized, FSDP, kind, options) == [filled] * 2
    for message in ranks2.run(foreign.materialized, FSDP, "lost", options):
        assert message.startswith("LayoutError: materialize: rope.table, rope.index: no state dict contains these ")
    for message in ranks2.run(foreign.materialized, FSDP, "wrong", options):
        assert message == "LayoutError: materialize: buffers['rope.table'] is [5], not [4]"


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (FSDP, ParallelOptions(activation_checkpointing="full")),
        (TP, ParallelOptions()),
        (PP, ParallelOptions()),
    ],
    ids=["fsdp", "tp", "pp"],
)
def test_a_model_of_transformers_from_meta(ranks2: Ranks, degrees: Degrees, options: ParallelOptions) -> None:
    pytest.importorskip("transformers")
    assert max(ranks2.run(foreign.llama_from_meta, degrees, options)) < 1e-5


@DATA
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "batch",
            "LayoutError: model: blocks.0.norm, blocks.1.norm: a BatchNorm1d would normalize each rank's ",
        ),
        ("batch-frozen", "no error"),
        (
            "mean",
            "LayoutError: model: after a step the buffers blocks.0.mean, blocks.1.mean differ between ",
        ),
        ("local", "no error"),
        ("shared", "no error"),
        ("spectral", "no error"),
    ],
)
def test_state_of_the_batch(ranks2: Ranks, degrees: Degrees, kind: str, says: str) -> None:
    for message in ranks2.run(foreign.batch_state, kind, degrees):
        assert message.startswith(says)


def test_norms_over_the_batch_of_one_rank(ranks2: Ranks) -> None:
    for kind in ("batch", "batch-frozen"):
        assert ranks2.run(foreign.batch_state, kind, PP) == ["no error"] * 2


@pytest.mark.parametrize("degrees", [FSDP, REPLICAS, PP], ids=["fsdp", "replicas", "pp"])
def test_ranks_with_other_tokens_or_layers_draw_other_masks(ranks2: Ranks, degrees: Degrees) -> None:
    (first, again, after, kept), (other, _, other_after, _) = ranks2.run(foreign.masks, degrees, ParallelOptions(), 0)
    assert first == again
    every = [tuple(mask) for mask in [*first, *other]]
    assert len(set(every)) == len(every)
    assert after == other_after
    assert kept


def test_tensor_parallel_ranks_draw_equal_masks(ranks2: Ranks) -> None:
    options = ParallelOptions(sequence_parallel=False)
    (first, again, after, _), (other, _, other_after, _) = ranks2.run(foreign.masks, TP, options, 0)
    assert first == again == other
    assert after == other_after
    assert len({tuple(mask) for mask in first}) == len(first)
    for message in ranks2.run(foreign.seeds_differ, TP, options):
        assert message.startswith("LayoutError: ranks got different arguments")
        assert "the state of torch's random generator (for dropout) is " in message


def test_a_step_without_dropout_draws_nothing(ranks2: Ranks) -> None:
    assert ranks2.run(foreign.untouched_stream, FSDP) == [True] * 2


@DATA
@pytest.mark.parametrize("look", ["part", "call", "modes"])
def test_a_look_between_backward_and_update(ranks2: Ranks, degrees: Degrees, look: str) -> None:
    options = ParallelOptions(reshard_after_forward="never")
    (expected, found), _ = (ranks2.run(foreign.looks, degrees, one, options) for one in ("", look)), None
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
