"""The snapshot: what one save has to write, collected at one instant and agreed upon by all ranks.

Called by `Checkpointer.save`; hands on a `Snapshot` to the host buffer and the writer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.manifest import digest_of
from titan_ckpt.save.plan import FILE_BYTES, PlannedFile, assign_writes
from titan_ckpt.save.replicas import (
    Groups,
    difference_error,
    digests_of,
    first_difference,
    group_by_holders,
    tensor_digests,
)
from titan_ckpt.state.shards import Part, ShardLayouts, collect
from titan_ckpt.state.tree import Stateful, split


@dataclass(frozen=True)
class Snapshot:
    """A state split into tensors and values, and who writes what of it.

    Attributes:
        values: The encoded values by top-level name; the same on every rank.
        metadata: The caller's metadata, encoded.
        metrics: The caller's metrics.
        tensors: The tensor that holds each part of this rank; the live memory.
        own: This rank's files.
        all_files: Every rank's files in rank order on rank 0, empty elsewhere.
    """

    values: dict[str, Any]
    metadata: Any
    metrics: dict[str, float]
    tensors: dict[Part, torch.Tensor]
    own: list[PlannedFile]
    all_files: list[PlannedFile]


class _Collected(NamedTuple):
    """What a rank collected from its own state, before the ranks agree."""

    values: dict[str, Any]
    parts: list[Part]
    tensors: list[torch.Tensor]
    metadata: Any
    metrics: dict[str, float]


class _Summary(NamedTuple):
    """What the ranks compare."""

    step: int
    digests: dict[str, str]  # of the values, by top-level name
    unchanged: bool  # whether this rank's parts are those of the last plan
    replicas: dict[int, str]  # digests of small tensors that other ranks hold too, by group; empty unless unchanged


class Planner:
    """Takes snapshots; reuses the write plan as long as the state's structure stays the same."""

    def __init__(self, ranks: Ranks, file_bytes: int = FILE_BYTES) -> None:
        self._ranks, self._file_bytes = ranks, file_bytes
        self._layouts = ShardLayouts()
        self._parts: list[Part] | None = None
        self._groups: Groups = {}
        self._own: list[PlannedFile] = []
        self._all: list[PlannedFile] = []

    def take(
        self,
        step: int,
        state: Mapping[str, Stateful],
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float],
        earliest: int = 0,
    ) -> Snapshot:
        """Collect the state and check that the ranks agree on it; collective.

        Args:
            step: The step.
            state: What to save, by top-level name.
            metadata: The caller's metadata.
            metrics: The caller's metrics.
            earliest: The step that the run loaded or saved last.

        Returns:
            The snapshot; its tensors are the live ones.

        Raises:
            CheckpointError: On all ranks, if something cannot be saved or the ranks' values differ.
        """

        def collect_own() -> tuple[_Collected, _Summary]:
            if type(step) is not int or not 0 <= step < 10**18:
                raise CheckpointError(f"the step must be an int from 0 upwards, not {step!r}")
            if step < earliest:
                raise CheckpointError(
                    f"step {step} comes before step {earliest}, which this run loaded or saved last: to go back, load "
                    "the checkpoint of an earlier step"
                )
            tensors, values = split(state)
            parts, held = collect(self._layouts, tensors)
            collected = _Collected(values, parts, held, encode(dict(metadata), "metadata"), _check_metrics(metrics))
            digests = {name: digest_of(values.get(name)) for name in state}
            unchanged = parts == self._parts
            replicas = digests_of(self._groups, _by_name(collected)) if unchanged else {}
            return collected, _Summary(step, digests, unchanged, replicas)

        own, summaries = self._ranks.run_and_share(f"collect the state of step {step}", collect_own)
        _check_agreement(summaries)
        replicas: Sequence[Mapping[int, str]] = [summary.replicas for summary in summaries]
        if not all(summary.unchanged for summary in summaries):
            self._plan(own.parts)
            what = "compare the tensors that are not sharded"
            replicas = self._ranks.gather_from_all(what, lambda: digests_of(self._groups, _by_name(own)))
        self._check_replicas(replicas, own)
        tensors = dict(zip(own.parts, own.tensors, strict=True))
        return Snapshot(own.values, own.metadata, own.metrics, tensors, self._own, self._all)

    def _plan(self, parts: Sequence[Part]) -> None:
        self._parts = None
        held = self._ranks.gather("plan which rank writes what", parts)
        own, groups = self._ranks.scatter_from_rank_0("plan which rank writes what", lambda: self._assign(held))
        self._own, self._groups, self._parts = own, groups, list(parts)

    def _assign(self, held: Sequence[Sequence[Part]]) -> list[tuple[list[PlannedFile], Groups]]:
        files = assign_writes(held, self._file_bytes)
        self._all = [file for of_rank in files for file in of_rank]
        return list(zip(files, group_by_holders(held), strict=True))

    def _check_replicas(self, digests: Sequence[Mapping[int, str]], own: _Collected) -> None:
        """Compare small tensors that several ranks hold. All ranks see the same digests, so all raise or none does."""
        difference = first_difference(digests)
        if difference is None:
            return
        group, first, second = difference

        def named() -> dict[str, str]:
            if self._ranks.rank not in (first, second):
                return {}
            tensors = _by_name(own)
            return tensor_digests({name: tensors[name] for name in self._groups[group]})

        raise difference_error(first, second, self._ranks.gather_from_all("compare tensors", named))


def _by_name(collected: _Collected) -> dict[str, torch.Tensor]:
    """Return this rank's tensors by name; for a sharded one, any of its shards."""
    return {part.name: tensor for part, tensor in zip(collected.parts, collected.tensors, strict=True)}


def _check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if type(name) is not str or type(value) not in (int, float) or (type(value) is int and abs(value) > 2**53):
            raise CheckpointError(f"metrics[{name!r}] is {value!r}: metrics must be names and plain numbers")
    return dict(metrics)


def _check_agreement(summaries: Sequence[_Summary]) -> None:
    """Compare every rank with rank 0. All ranks see the same list, so all raise or none does."""
    first = summaries[0]
    for rank, summary in enumerate(summaries):
        if summary.step != first.step:
            raise CheckpointError(f"rank {rank} saves step {summary.step} but rank 0 saves step {first.step}")
        if summary.digests.keys() != first.digests.keys():
            raise CheckpointError(
                f"rank {rank} saves the entries {list(summary.digests)} but rank 0 saves {list(first.digests)}"
            )
        for name, digest in first.digests.items():
            if summary.digests[name] != digest:
                raise CheckpointError(
                    f'state["{name}"]: values that are not tensors differ between rank {rank} and rank 0. They are '
                    "saved once, so they must be the same on all ranks; put per-rank data into a sharded tensor"
                )
