"""A step sends the bytes that theory predicts, and no more.

The model has an embedding table, 3 blocks, and a norm and a vocabulary matrix that make one unit: 5 units for FSDP.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import parallel_traffic
from ranks import Ranks
from titan_parallel import Degrees, ParallelOptions

pytestmark = pytest.mark.skipif(find_spec("numpy") is None, reason="torch's CommDebugMode imports numpy")

BLOCKS = 3
FSDP_UNITS = 1 + BLOCKS + 1


def count(group: Ranks, degrees: Degrees, options: ParallelOptions, microbatches: int = 1) -> tuple[dict, dict]:
    first, *others = group.run(parallel_traffic.collectives, degrees, options, microbatches)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("reshard", ["default", "always", "never"])
def test_fsdp(ranks2: Ranks, reshard: str) -> None:
    training, clipping = count(ranks2, Degrees(), ParallelOptions(reshard_after_forward=reshard))
    # Forward gathers every unit. Backward gathers the blocks once more if they were freed; not the last unit, which is
    # kept because its backward comes at once, nor the table, whose gradient does not depend on its values.
    assert training == {"all_gather": FSDP_UNITS + (0 if reshard == "never" else BLOCKS), "reduce_scatter": FSDP_UNITS}
    assert clipping == {"all_reduce": 1}


@pytest.mark.parametrize("reduce_every", [True, False])
def test_fsdp_accumulating(ranks2: Ranks, reduce_every: bool) -> None:
    options = ParallelOptions(reshard_after_forward="never", reduce_every_microbatch=reduce_every)
    training, _ = count(ranks2, Degrees(), options, 3)
    # Weights are freed after each backward; gradients are scattered then too, or once. At the end of a backward that
    # others came before, torch fetches one unit in advance that nobody asks for.
    assert training == {"all_gather": 3 * FSDP_UNITS + 1, "reduce_scatter": (3 if reduce_every else 1) * FSDP_UNITS}


def test_replicas_exchange_gradients_once_a_step(ranks2: Ranks) -> None:
    # Shards of one rank are gathered and scattered without a word. Each unit's gradient is summed over the replicas in
    # the last microbatch only, for it holds those of the others.
    for microbatches in (1, 3):
        training, _ = count(ranks2, Degrees(dp_replicate=2), ParallelOptions(), microbatches)
        assert training == {"all_reduce": FSDP_UNITS}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_tensor_parallel_with_sequence_parallel(ranks2: Ranks, checkpointing: str) -> None:
    training, clipping = count(ranks2, Degrees(tp=2), ParallelOptions(activation_checkpointing=checkpointing))
    # Attention and MLP each gather the sequence before and scatter their sum after, and the other way round in
    # backward: 2 x 2 of both kinds a block. The table scatters its sum in forward (backward: gather), the vocabulary
    # matrix gathers its input (backward: scatter).
    gathers = scatters = 4 * BLOCKS + 2
    # Checkpointing runs a block's forward again, up to the last thing that backward needs: both gathers, but only the
    # first scatter, which `selective` has saved.
    if checkpointing != "none":
        gathers += 2 * BLOCKS
    if checkpointing == "full":
        scatters += BLOCKS
    # Each rank has a part of the gradients of the norms, two in a block and the last, each weight and bias, and of the
    # weight that norms a block's heads. The loss over a split vocabulary needs the maximum, the sum of exponentials and
    # the logit of the label.
    assert training == {
        "all_gather": gathers,
        "reduce_scatter": scatters,
        "all_reduce": 2 * (2 * BLOCKS + 1) + BLOCKS + 3,
    }
    # Split parameters' squares are summed over ranks, copied ones' are not.
    assert clipping == {"all_reduce": 1}


def test_shared_heads(ranks2: Ranks) -> None:
    training, clipping = ranks2.run(parallel_traffic.collectives_of_shared_heads)[0]
    # The sequence is gathered and scattered as above. Beside what is copied on every rank, the ranks sum the gradients
    # of the head that they share: weight and bias of keys, weight of values.
    gathers = 4 * BLOCKS + 2
    all_reduces = 2 * (2 * BLOCKS + 1) + BLOCKS + 3 + 3 * BLOCKS
    assert training == {"all_gather": gathers, "reduce_scatter": gathers, "all_reduce": all_reduces}
    assert clipping == {"all_reduce": 1}


def test_tensor_parallel_without_sequence_parallel(ranks2: Ranks) -> None:
    training, _ = count(ranks2, Degrees(tp=2), ParallelOptions(sequence_parallel=False))
    # What was a scatter and a gather is one all-reduce: forward, attention, MLP and table; backward, attention, MLP and
    # vocabulary matrix. Norms see full sequences, and so have complete gradients, except those of a rank's heads. The
    # loss needs 3, as above.
    assert training == {"all_reduce": (2 * BLOCKS + 1) + (2 * BLOCKS + 1) + BLOCKS + 3}
