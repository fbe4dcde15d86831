"""Which rank writes which part of which tensor, and into which file.

Every rank tells what it holds. Where several hold the same part (replicas), the one with the least to write so far
writes it. Where a DTensor's shard lies in the whole tensor is DTensor's own answer, the one that torch's distributed
checkpoint (DCP) plans by. What is done with it is ours: DCP's plans are objects to be pickled and cost seconds for
thousands of tensors; these are tuples, and are kept from one save to the next while the state keeps its form.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from titan_ckpt.boxes import Box, flaw_in_cover, whole
from titan_ckpt.checksum import checksum
from titan_ckpt.errors import CheckpointError
from titan_ckpt.tensorfile import is_storable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FILE_BYTES = 16 << 30  # a file is closed when the next chunk would take it beyond this


class Part(NamedTuple):
    """A part of a tensor that a rank holds.

    Attributes:
        name: the tensor's.
        dtype: its type.
        shape: its whole shape.
        box: which part of it this is.
        cut: over which ranks and how the tensor is cut into such parts; "" where it is not cut.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    cut: str = ""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.box.volume * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file that one rank writes.

    Attributes:
        name: the file's.
        parts: what is in it, in order.
    """

    name: str
    parts: tuple[Part, ...]


class Layouts:
    """Finds where shards lie; remembers, for models have few kinds of shards and many tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, list[Box]]] = {}

    def parts_of(self, name: str, tensor: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
        """Return the parts of a tensor that this rank holds, each with the plain tensor that holds it.

        Args:
            name: the tensor's.
            tensor: plain or DTensor.

        Returns:
            The parts; none when this rank's shard is empty and others' are not.

        Raises:
            CheckpointError: when it is of a kind that cannot be saved or loaded.
        """
        _refuse_unfit(name, tensor)
        shape = tuple(tensor.shape)
        tensor = tensor.detach()
        if not is_dtensor(tensor):
            return [(Part(name, tensor.dtype, shape, whole(shape)), tensor)]
        local = tensor.to_local()
        if math.prod(shape) == 0:
            empty = local.new_empty(shape)
            return [(Part(name, tensor.dtype, shape, whole(shape)), empty)]
        cut, boxes = self._cut_of(tensor)
        if len(boxes) == 1:
            shards = [local]
        else:  # a local tensor that is itself made of several shards
            shards = [_shard_at(tensor, name, box, place) for place, box in enumerate(boxes)]
        for box, shard in zip(boxes, shards, strict=True):
            if tuple(shard.shape) != box.lengths and box.volume:
                raise CheckpointError(
                    f"{name}: this rank's shard has the shape {list(shard.shape)}, where its placement "
                    f"{tensor.placements} says {list(box.lengths)}"
                )
        held = zip(boxes, shards, strict=True)
        return [(Part(name, tensor.dtype, shape, box, cut), shard) for box, shard in held if box.volume]

    def _cut_of(self, tensor: "DTensor") -> tuple[str, list[Box]]:
        mesh = tensor.device_mesh
        if mesh.get_coordinate() is None:  # this rank is not on the mesh
            return "", []
        kind = (mesh, tensor.placements, tensor.shape)
        if kind not in self._known:
            chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
            self._known[kind] = checksum(repr((mesh.mesh.tolist(), tensor.placements)).encode())[:16], boxes
        return self._known[kind]


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Tell whether a tensor is a DTensor, without the two seconds of importing them where there are none."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def divide(held: Sequence[Sequence[Part]], file_bytes: int) -> list[list[PlannedFile]]:
    """Decide which rank writes what.

    Args:
        held: what each rank holds.
        file_bytes: about how large a file may get; one chunk may be larger.

    Returns:
        The files of each rank; all of them together hold every part once.

    Raises:
        CheckpointError: when the ranks' tensors do not fit together.
    """
    chosen = _boxes_to_write(held)
    holders: dict[tuple[str, Box], dict[int, Part]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            if part.box in chosen[part.name]:
                holders.setdefault((part.name, part.box), {})[rank] = part
    load = [0] * len(held)
    own: list[list[Part]] = [[] for _ in held]
    # Those that only one rank can write first, then the largest: the rest evens out what differs.
    for ranks in sorted(holders.values(), key=lambda ranks: (len(ranks) > 1, -next(iter(ranks.values())).nbytes)):
        rank = min(ranks, key=lambda rank: load[rank])
        load[rank] += ranks[rank].nbytes
        own[rank].append(ranks[rank])
    order = {at: place for place, at in enumerate(holders)}
    # Wider types first, so that every chunk is aligned; else as the state has them.
    own = [sorted(parts, key=lambda part: (-part.dtype.itemsize, order[part.name, part.box])) for parts in own]
    split = [list(_filed(parts, file_bytes)) for parts in own]
    total, number = sum(len(files) for files in split), itertools.count()
    return [
        [PlannedFile(f"tensors-{next(number):05d}-of-{total:05d}.safetensors", tuple(parts)) for parts in files]
        for files in split
    ]


def _filed(parts: Sequence[Part], file_bytes: int) -> Iterator[list[Part]]:
    file: list[Part] = []
    size = 0
    for part in parts:
        if file and size + part.nbytes > file_bytes:
            yield file
            file, size = [], 0
        file.append(part)
        size += part.nbytes
    if file:
        yield file


def _boxes_to_write(held: Sequence[Sequence[Part]]) -> dict[str, set[Box]]:
    """Return, for each tensor, the parts that make it up; refuse what makes up none."""
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
    cuts: dict[str, dict[str, set[Box]]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            dtype, shape, first = kinds.setdefault(part.name, (part.dtype, part.shape, rank))
            if (dtype, shape) != (part.dtype, part.shape):
                raise CheckpointError(
                    f"the tensor {part.name} is {part.dtype} {list(part.shape)} on rank {rank} and {dtype} "
                    f"{list(shape)} on rank {first}: a name means one tensor on all ranks"
                )
            cuts.setdefault(part.name, {}).setdefault(part.cut, set()).add(part.box)
    chosen = {}
    for name, (_, shape, _) in kinds.items():
        chosen[name] = set().union(*cuts[name].values())
        flaw = flaw_in_cover(shape, list(chosen[name]))
        if flaw is None:
            continue
        # A weight tied across pipeline stages may be cut otherwise in each: then one cut is written, the finest.
        if any(flaw_in_cover(shape, list(boxes)) for boxes in cuts[name].values()):
            raise CheckpointError(
                f"the ranks' parts do not make up the tensor {name}, which {flaw}. Is it a DTensor on some ranks and "
                "plain on others, or does a rank that holds a part of it not save?"
            )
        chosen[name] = max(cuts[name].values(), key=len)
    return chosen


def _refuse_unfit(name: str, tensor: torch.Tensor) -> None:
    if not is_storable(tensor.dtype):
        raise CheckpointError(f"{name} is of {tensor.dtype}, which safetensors files cannot hold: convert it first")
    if not name.isascii() and name.encode("utf-8", "replace").decode() != name:
        raise CheckpointError(f"the name {name!r} cannot be written as UTF-8, as safetensors files need it: rename it")
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise CheckpointError(
                f"{name} is a DTensor with partial sums; redistribute it to Shard or Replicate before saving"
            )
        tensor = tensor.to_local()
    if is_traceable_wrapper_subclass(tensor):
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__}, a tensor made of others: put those into the state instead"
        )


def _shard_at(tensor: "DTensor", name: str, box: Box, place: int) -> torch.Tensor:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    index = MetadataIndex(name, torch.Size(box.offsets), place)
    shard: torch.Tensor = tensor.__get_tensor_shard__(index)  # type: ignore[no-untyped-call]
    return shard


def collect(layouts: Layouts, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Part], list[torch.Tensor]]:
    """Return the parts that this rank holds of a state's tensors, and the plain tensors that hold them."""
    held = [at for name, tensor in tensors.items() for at in layouts.parts_of(name, tensor)]
    return [part for part, _ in held], [tensor for _, tensor in held]
