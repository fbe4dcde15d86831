"""The shards of each tensor that this rank holds, and their position in the global tensor."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from titan_ckpt._compat import chunks_of, shard_of, strided_split_factor, wraps_tensors
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.boxes import Box, full_box
from titan_ckpt.format.checksum import checksum
from titan_ckpt.format.safetensors_header import is_storable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


class Part(NamedTuple):
    """A slice of a tensor that a rank holds.

    Attributes:
        name: The tensor's name.
        dtype: Its dtype.
        shape: Its global shape.
        box: The slice.
        layout: Identifies the mesh and placements that cut the tensor into such slices; "" if it is not sharded.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    layout: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.box.volume * self.dtype.itemsize


class ShardLayouts:
    """Computes the position of shards; cached, because a model has few kinds of shards and many tensors."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, list[Box]]] = {}

    def local_parts(self, name: str, tensor: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
        """Return the slices of a tensor that this rank holds, each with the local tensor that holds it.

        Args:
            name: The tensor's name.
            tensor: A regular tensor or a DTensor.

        Returns:
            The slices; empty if this rank's shard is empty and others' are not.

        Raises:
            CheckpointError: If it is of a kind that cannot be saved or loaded.
        """
        _check_supported(name, tensor)
        shape = tuple(tensor.shape)
        tensor = tensor.detach()
        if not is_dtensor(tensor):
            return [(Part(name, tensor.dtype, shape, full_box(shape)), tensor)]
        local = tensor.to_local()
        if math.prod(shape) == 0:
            empty = local.new_empty(shape)
            return [(Part(name, tensor.dtype, shape, full_box(shape)), empty)]
        layout, boxes = self._layout_of(tensor, local)
        if len(boxes) == 1:
            shards = [local]
        else:  # a local tensor that itself consists of several shards
            shards = [shard_of(tensor, name, box.offsets, place) for place, box in enumerate(boxes)]
        for box, shard in zip(boxes, shards, strict=True):
            if tuple(shard.shape) != box.lengths and box.volume:
                raise CheckpointError(
                    f"{name}: this rank's shard has the shape {list(shard.shape)}, but its placement "
                    f"{tensor.placements} implies {list(box.lengths)}"
                )
        held = zip(boxes, shards, strict=True)
        return [(Part(name, tensor.dtype, shape, box, layout), shard) for box, shard in held if box.volume]

    def _layout_of(self, tensor: "DTensor", local: torch.Tensor) -> tuple[str, list[Box]]:
        mesh, placements = tensor.device_mesh, tensor.placements
        coordinate = mesh.get_coordinate()
        if coordinate is None:  # this rank is not on the mesh
            return "", []
        kind = (mesh, placements, tensor.shape, local.shape)
        if kind not in self._known:
            box = box_within_shards(tensor.shape, placements, mesh.shape, coordinate)
            fits = box is not None and (box.lengths == tuple(local.shape) or box.volume == local.numel() == 0)
            boxes = [box] if box is not None and fits else [Box(*chunk) for chunk in chunks_of(tensor)]
            self._known[kind] = checksum(repr((mesh.mesh.tolist(), placements)).encode())[:16], boxes
        return self._known[kind]


def box_within_shards(
    shape: Sequence[int], placements: Sequence["Placement"], sizes: Sequence[int], coordinate: Sequence[int]
) -> Box | None:
    """Compute a rank's slice where FSDP2 shards the shards of tensor or expert parallelism.

    FSDP2 cuts a local shard as `torch.chunk` does and records that as a `_StridedShard` placement. DTensor's own
    definition of that placement gives another slice where sizes do not divide: with 9 rows over 2 x 4 ranks it assigns
    a row to a rank that holds none. So these placements are resolved here, in the order in which FSDP2 applied them:
    first the regular shards, then the strided ones within them.

    Args:
        shape: The global shape.
        placements: One placement per mesh dim.
        sizes: The mesh's sizes.
        coordinate: This rank's coordinate in the mesh.

    Returns:
        The slice; None if there is no `_StridedShard`, or one that FSDP2 would not produce.
    """
    strided = [dim for dim, placement in enumerate(placements) if strided_split_factor(placement) is not None]
    if not strided:
        return None
    shards = [dim for dim, placement in enumerate(placements) if dim not in strided and placement.is_shard()]
    axes: list[int] = [getattr(placement, "dim", -1) for placement in placements]
    for dim in strided:
        same_axis = [other for other in (*shards, *strided) if other != dim and axes[other] == axes[dim]]
        split_factor = math.prod(sizes[other] for other in same_axis)
        if any(other < dim for other in same_axis) or strided_split_factor(placements[dim]) != split_factor:
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
    """Return whether a tensor is a DTensor, without importing them (two seconds) for regular tensors."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _check_supported(name: str, tensor: torch.Tensor) -> None:
    if not is_storable(tensor.dtype):
        raise CheckpointError(f"{name} is {tensor.dtype}, which the safetensors format lacks: convert it first")
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise CheckpointError(
                f"{name} is a DTensor with a Partial placement: redistribute it to Shard or Replicate before saving"
            )
        tensor = tensor.to_local()
    if wraps_tensors(tensor):
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__}, a tensor subclass that wraps other tensors: put those into the "
            "state instead"
        )


def collect(layouts: ShardLayouts, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Part], list[torch.Tensor]]:
    """Return the slices that this rank holds of a state's tensors, and the local tensors that hold them."""
    held = [at for name, tensor in tensors.items() for at in layouts.local_parts(name, tensor)]
    return [part for part, _ in held], [tensor for _, tensor in held]
