"""Tensors to files and back, by torch's distributed checkpoint (DCP).

DCP's planner decides which rank writes which part of which tensor (replicas once), and on load which parts of which
files fill the local shards, whatever the two layouts are. This file goes through its steps one by one, as the
docstrings of SavePlanner and StorageWriter lay them out, so that each step fails on all ranks or on none.

DCP keeps its own record of the parts in `.metadata`, a pickle. It is written, so that the folder stays one that
`torch.distributed.checkpoint.load` and torch's converters read, but it is never read here, for to unpickle a file
is to run it. What loading needs from it is kept as JSON, the index.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from titan_ckpt.collective import Ranks
from titan_ckpt.index import Index, dtype_name


@dataclass(frozen=True)
class _Stored:
    """Where a chunk lies: what FileSystemReader looks up."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def write_tensors(ranks: Ranks, folder: Path, tensors: dict[str, torch.Tensor]) -> Index:
    """Write each rank's part of the tensors; collective.

    Plain tensors are taken to be the same on every rank that has them, and are written once.

    Args:
        ranks: who takes part.
        folder: an empty folder that all ranks see.
        tensors: this rank's tensors by key; ranks may have different ones.

    Returns:
        The index of all tensors on rank 0, an empty one elsewhere.

    Raises:
        CheckpointError: on all ranks, when one could not write.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(folder, overwrite=False)  # syncs each file to the disk
    metadata: list[Metadata] = []

    def plan_own() -> SavePlan:
        _refuse_partial(tensors)
        planner.set_up_planner(tensors, writer.storage_meta(), ranks.rank == 0)
        writer.set_up_storage_writer(ranks.rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = ranks.gather(ranks.together("plan the writing of the tensors", plan_own))

    def plan_all() -> list[SavePlan]:
        global_plans, global_metadata = planner.create_global_plan(plans)
        metadata.append(global_metadata)
        return writer.prepare_global_plan(global_plans)

    plan = ranks.deal("divide the tensors over the ranks", plan_all)

    def write_own() -> list[WriteResult]:
        return writer.write_data(planner.finish_plan(plan), planner).wait()

    written = ranks.gather(ranks.together(f"write the tensors to {folder}", write_own))
    index: Index = {}

    def finish() -> None:
        writer.finish(metadata[0], written)
        index.update(_index_of(metadata[0], written))

    ranks.on_first("write the record of the tensors", finish)
    return index


def read_tensors(folder: Path, index: Index, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in place from a checkpoint; each rank reads what it needs, by itself.

    Args:
        folder: where `write_tensors` wrote.
        index: what it returned on rank 0; it must hold every key of `tensors`, in the same shape and type.
        tensors: what to fill, in whatever sharding.
    """
    metadata = _metadata_of(index, set(tensors))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(folder)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _refuse_partial(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(
                f"{key} is a DTensor with partial sums; redistribute it to Shard or Replicate before saving"
            )


def _index_of(metadata: Metadata, written: list[list[WriteResult]]) -> Index:
    places = {result.index: result.storage_data for part in written for result in part}
    index: Index = {}
    for key, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # no bytes are ever given to DCP
        chunks = []
        for chunk in stored.chunks:
            at = places[MetadataIndex(key, chunk.offsets)]
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            chunks.append(
                {"offsets": offsets, "sizes": sizes, "file": at.relative_path, "start": at.offset, "length": at.length}
            )
        index[key] = {"dtype": dtype_name(stored.properties.dtype), "shape": list(stored.size), "chunks": chunks}
    return index


def _metadata_of(index: Index, keys: set[str]) -> Metadata:
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _Stored] = {}
    for key in keys:
        entry = index[key]
        chunks = [ChunkStorageMetadata(torch.Size(at["offsets"]), torch.Size(at["sizes"])) for at in entry["chunks"]]
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        tensors[key] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        for place, (chunk, at) in enumerate(zip(chunks, entry["chunks"], strict=True)):
            where = MetadataIndex(key, chunk.offsets, place)
            places[where] = _Stored(relative_path=at["file"], offset=at["start"], length=at["length"])
    return Metadata(tensors, storage_data=places)
