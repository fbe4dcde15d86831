"""What one save has to write, taken at one instant and agreed upon by all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.tree import Stateful, digest, encode, split


@dataclass(frozen=True)
class Snapshot:
    """A state taken apart.

    Attributes:
        step: the step it belongs to.
        tensors: this rank's tensors by flat key.
        values: the JSON by top-level name; the same on every rank.
        metadata: the caller's words on the checkpoint, encoded; rank 0's count.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    metadata: Any


def take_snapshot(
    ranks: Ranks, step: int, state: Mapping[str, Stateful], metadata: Mapping[str, Any], *, copy: bool
) -> Snapshot:
    """Take the state apart and see that the ranks agree on it; collective.

    Args:
        ranks: who takes part.
        step: the step it belongs to.
        state: what to save, by top-level name.
        metadata: the caller's words on the checkpoint.
        copy: whether to copy the tensors to fresh CPU memory, so that training may go on changing them.

    Returns:
        The snapshot; unless copied, its tensors are the live ones.

    Raises:
        CheckpointError: on all ranks, when something cannot be saved or the ranks' JSON differs.
    """

    def take() -> Snapshot:
        if type(step) is not int or step < 0:
            raise CheckpointError(f"the step must be an int from 0 upwards, not {step!r}")
        tensors, values = split(state)
        if copy:
            tensors = copy_to_cpu(tensors)
        return Snapshot(step, tensors, values, encode(dict(metadata), "metadata"))

    snapshot = ranks.together(f"collect the state of step {step}", take)
    digests = {name: digest(snapshot.values.get(name)) for name in state}
    _refuse_differences(ranks.all_gather((step, digests)))
    return snapshot


def copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to fresh CPU memory.

    Args:
        tensors: plain tensors, or DTensors, of which the local shards are copied.

    Returns:
        The copies by the same keys; a DTensor keeps its mesh and placements.
    """
    return {key: tensor.detach().to(device="cpu", copy=True) for key, tensor in tensors.items()}


def _refuse_differences(told: list[tuple[int, dict[str, str]]]) -> None:
    """Compare what the ranks told with what rank 0 told; all ranks see the same list and come to the same end."""
    first_step, first = told[0]
    for rank, (step, digests) in enumerate(told):
        if step != first_step:
            raise CheckpointError(f"rank {rank} saves step {step} where rank 0 saves step {first_step}")
        if digests.keys() != first.keys():
            raise CheckpointError(f"rank {rank} saves the entries {list(digests)} where rank 0 saves {list(first)}")
        for name in first:
            if digests[name] != first[name]:
                raise CheckpointError(
                    f'state["{name}"] is not the same on all ranks: what is not a tensor differs on rank {rank} from '
                    "rank 0. It is saved once, so it must be; keep what belongs to one rank in a sharded tensor"
                )
