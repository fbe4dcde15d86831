"""What one save has to write, taken at one instant and agreed upon by all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.manifest import digest_of
from titan_ckpt.save.plan import FILE_BYTES, PlannedFile, divide
from titan_ckpt.state.shards import Layouts, Part, collect
from titan_ckpt.state.tree import Stateful, split


@dataclass(frozen=True)
class Snapshot:
    """A state taken apart, and who writes what of it.

    Attributes:
        values: the JSON by top-level name; the same on every rank.
        metadata: the caller's words on the checkpoint, encoded.
        metrics: the caller's numbers.
        tensors: what holds each part that this rank has, by part; the live memory.
        own: this rank's files.
        all_files: every rank's files, in order of rank; on rank 0, empty elsewhere.
    """

    values: dict[str, Any]
    metadata: Any
    metrics: dict[str, float]
    tensors: dict[Part, torch.Tensor]
    own: list[PlannedFile]
    all_files: list[PlannedFile]


class Planner:
    """Takes snapshots; keeps the plan of the last one for as long as the state keeps its form."""

    def __init__(self, ranks: Ranks, file_bytes: int = FILE_BYTES) -> None:
        self._ranks, self._file_bytes = ranks, file_bytes
        self._layouts = Layouts()
        self._parts: list[Part] | None = None
        self._own: list[PlannedFile] = []
        self._all: list[PlannedFile] = []

    def take(
        self, step: int, state: Mapping[str, Stateful], metadata: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> Snapshot:
        """Take the state apart and see that the ranks agree on it; collective.

        Args:
            step: the step it belongs to.
            state: what to save, by top-level name.
            metadata: the caller's words on the checkpoint.
            metrics: the caller's numbers.

        Returns:
            The snapshot; its tensors are the live ones.

        Raises:
            CheckpointError: on all ranks, when something cannot be saved or the ranks' values differ.
        """
        taken: list[Any] = []

        def take() -> tuple[int, dict[str, str], bool]:
            if type(step) is not int or not 0 <= step < 10**18:
                raise CheckpointError(f"the step must be an int from 0 upwards, not {step!r}")
            tensors, values = split(state)
            parts, held = collect(self._layouts, tensors)
            taken.extend([values, parts, held, encode(dict(metadata), "metadata"), _numbers(metrics)])
            return step, {name: digest_of(values.get(name)) for name in state}, parts == self._parts

        told = self._ranks.share(f"collect the state of step {step}", take)
        _refuse_differences([(its_step, digests) for its_step, digests, _ in told])
        values, parts, held, encoded, numbers = taken
        if not all(same for _, _, same in told):
            self._plan(parts)
        tensors = dict(zip(parts, held, strict=True))
        return Snapshot(values, encoded, numbers, tensors, self._own, self._all)

    def _plan(self, parts: Sequence[Part]) -> None:
        self._parts = None
        held = self._ranks.gather(parts)
        own = self._ranks.deal("divide the tensors over the ranks", lambda: self._divided(held))
        self._own, self._parts = own, list(parts)

    def _divided(self, held: Sequence[Sequence[Part]]) -> list[list[PlannedFile]]:
        files = divide(held, self._file_bytes)
        self._all = [file for of_rank in files for file in of_rank]
        return files


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if type(name) is not str or type(value) not in (int, float) or (type(value) is int and abs(value) > 2**53):
            raise CheckpointError(f"metrics[{name!r}] is {value!r}: metrics are names and plain numbers")
    return dict(metrics)


def _refuse_differences(told: Sequence[tuple[int, dict[str, str]]]) -> None:
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
