"""Which parts of which tensors this rank holds: where a DTensor's shards lie in the whole."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, whole
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.safetensors_header import is_storable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


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
        cut, boxes = self._cut_of(tensor, local)
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

    def _cut_of(self, tensor: "DTensor", local: torch.Tensor) -> tuple[str, list[Box]]:
        mesh, placements = tensor.device_mesh, tensor.placements
        coordinate = mesh.get_coordinate()
        if coordinate is None:  # this rank is not on the mesh
            return "", []
        kind = (mesh, placements, tensor.shape, local.shape)
        if kind not in self._known:
            box = box_within_shards(tensor.shape, placements, mesh.shape, coordinate)
            fits = box is not None and (box.lengths == tuple(local.shape) or box.volume == local.numel() == 0)
            if box is not None and fits:
                boxes = [box]
            else:
                chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
                boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
            self._known[kind] = checksum(repr((mesh.mesh.tolist(), placements)).encode())[:16], boxes
        return self._known[kind]


def box_within_shards(
    shape: Sequence[int], placements: Sequence["Placement"], sizes: Sequence[int], coordinate: Sequence[int]
) -> Box | None:
    """Find the part that a rank has of what FSDP2 sharded within the shards of tensor or expert parallelism.

    FSDP2 cuts a shard as `torch.chunk` does and calls that a `_StridedShard`. By its own definition, that placement is
    another part where the sizes do not divide: of 9 rows over 2 x 4 ranks, DTensor gives a row to a rank that has none.

    Args:
        shape: the whole tensor's.
        placements: one per mesh dim.
        sizes: the mesh's.
        coordinate: this rank's place in the mesh.

    Returns:
        The part; None where no `_StridedShard` is, or not as FSDP2 makes it.
    """
    strided = [dim for dim, placement in enumerate(placements) if type(placement).__name__ == "_StridedShard"]
    if not strided:
        return None
    shards = [dim for dim, placement in enumerate(placements) if dim not in strided and placement.is_shard()]
    axes: list[int] = [getattr(placement, "dim", -1) for placement in placements]
    for dim in strided:
        beside = [other for other in (*shards, *strided) if other != dim and axes[other] == axes[dim]]
        split_factor = getattr(placements[dim], "split_factor", 0)
        if any(other < dim for other in beside) or split_factor != math.prod(sizes[other] for other in beside):
            return None
    offsets, lengths = [0] * len(shape), list(shape)
    for dim in (*shards, *strided):
        axis = axes[dim]
        step = -(-lengths[axis] // sizes[dim])
        start = min(coordinate[dim] * step, lengths[axis])
        offsets[axis] += start
        lengths[axis] = min(step, lengths[axis] - start)
    return Box(tuple(offsets), tuple(lengths))


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Tell whether a tensor is a DTensor, without the two seconds of importing them where there are none."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _refuse_unfit(name: str, tensor: torch.Tensor) -> None:
    if not is_storable(tensor.dtype):
        raise CheckpointError(f"{name} is of {tensor.dtype}, which safetensors files cannot hold: convert it first")
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
