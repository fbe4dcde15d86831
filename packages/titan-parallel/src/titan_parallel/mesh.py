"""The device mesh: from degrees to named dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_parallel.errors import LayoutError

MESH_DIMS = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each kind of parallelism splits the work; the product is the world size.

    Attributes:
        dp_replicate: Copies of the (sharded) model, each on its own part of the batch.
        dp_shard: Ranks over which FSDP2 shards each copy, each on its own part of the batch; -1 takes all that the
            others leave.
        tp: Ranks that share every matrix product (tensor parallelism), on the same part of the batch.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1

    def resolve(self, world: int) -> Degrees:
        """Return the degrees with -1 filled in.

        Args:
            world: Number of processes.

        Raises:
            LayoutError: If they cannot multiply to `world`.
        """
        wrong = [f"{name} is {value}" for name, value in self._items() if value < 1 and (name, value) != _REST]
        if wrong:
            raise LayoutError(f"degrees must be at least 1 (dp_shard may be -1, for the rest): {', '.join(wrong)}")
        fixed = self.dp_replicate * self.tp
        if world % fixed or self.dp_shard not in (-1, world // fixed):
            raise LayoutError(self._misfit(world))
        return replace(self, dp_shard=world // fixed)

    def _items(self) -> list[tuple[str, int]]:
        return [(name, getattr(self, name)) for name in MESH_DIMS]

    def _misfit(self, world: int) -> str:
        asked = " x ".join(f"{name} {value}" for name, value in self._items() if (name, value) != _REST)
        product = math.prod(value for name, value in self._items() if (name, value) != _REST)
        how = "does not divide" if self.dp_shard == -1 else "is not"
        divisors = [tp for tp in range(1, world + 1) if world % tp == 0]
        near_tp = min(divisors, key=lambda tp: (abs(tp - self.tp), tp))
        rest = world // near_tp
        near_replicate = min((d for d in divisors if rest % d == 0), key=lambda d: (abs(d - self.dp_replicate), d))
        works = f"dp_replicate {near_replicate}, dp_shard {rest // near_replicate}, tp {near_tp}"
        return f"{asked} = {product}, which {how} the number of processes, {world}; this would work: {works}"


_REST = ("dp_shard", -1)


class DataAxis(NamedTuple):
    """Where this rank stands among those that read different rows of the batch."""

    rank: int
    world: int


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """Lay all ranks of the default process group out as a mesh with the dimensions `MESH_DIMS`.

    Tensor-parallel peers are neighbours, so that they share a host wherever the degree allows it.

    Args:
        degrees: The layout; -1 is filled in from the world size.
        device_type: `cpu` or `cuda`.

    Returns:
        The mesh. Dimensions of size 1 are there too.

    Raises:
        LayoutError: If the degrees do not multiply to the world size.
    """
    full = degrees.resolve(dist.get_world_size())
    return init_device_mesh(device_type, (full.dp_replicate, full.dp_shard, full.tp), mesh_dim_names=MESH_DIMS)


def data_axis(mesh: DeviceMesh) -> DataAxis:
    """Return this rank's place on the data axis of `mesh`: `rank` of `world` readers; TP peers share a place."""
    shard = mesh["dp_shard"]
    replicate = mesh["dp_replicate"]
    rank = replicate.get_local_rank() * shard.size() + shard.get_local_rank()
    return DataAxis(rank, replicate.size() * shard.size())
