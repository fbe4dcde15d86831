"""The device mesh: from degrees to named dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_parallel.agreement import check_agreement
from titan_parallel.errors import LayoutError

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")

_NEAREST = 3  # layouts in a message


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each kind of parallelism splits the work; the product is the world size.

    Attributes:
        dp_replicate: Copies of the (sharded) model, each on its own part of the batch.
        dp_shard: Ranks over which FSDP2 shards each copy, each on its own part of the batch; -1 takes all that the
            others leave.
        ep: Ranks over which the experts of a mixture are spread (expert parallelism), each on its own part of the
            batch. What is no expert is sharded over `dp_shard * ep * cp` ranks.
        cp: Ranks that share each sequence (context parallelism), on the same rows of the batch.
        tp: Ranks that share every matrix product (tensor parallelism), on the same part of the batch.
        pp: Ranks that share the blocks (pipeline parallelism), on the same part of the batch.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

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
        fixed = math.prod(value for name, value in self._items() if name != "dp_shard")
        if world % fixed or self.dp_shard not in (-1, world // fixed):
            raise LayoutError(self._misfit(world))
        return replace(self, dp_shard=world // fixed)

    @property
    def readers(self) -> int:
        """Ranks that read different rows of the batch; `dp_shard` must not be -1 any more."""
        assert self.dp_shard > 0
        return self.dp_replicate * self.dp_shard * self.ep

    def _items(self) -> list[tuple[str, int]]:
        return [(name, getattr(self, name)) for name in MESH_DIMS]

    def _misfit(self, world: int) -> str:
        said = [(name, value) for name, value in self._items() if (name, value) != _REST]
        asked = " x ".join(f"{name} {value}" for name, value in said if value > 1 or name == "dp_shard") or "tp 1"
        product = math.prod(value for _, value in said)
        how = "does not divide" if self.dp_shard == -1 else "is not"
        near = "; or ".join(self._near(world))
        return f"{asked} = {product}, which {how} the number of processes, {world}; this would work: {near}"

    def _near(self, world: int) -> list[str]:
        """Return the layouts for `world` ranks that are nearest: those that change the fewest degrees by the least."""
        wanted = {name: value for name, value in self._items() if name != "dp_shard"}
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        names = [name for name, value in wanted.items() if value > 1] or ["tp"]
        found = sorted(
            (_distance(wanted, dict(zip(names, chosen, strict=True))), chosen)
            for chosen in _products(world, divisors, [wanted[name] for name in names])
        )
        layouts = []
        for _, chosen in found[:_NEAREST]:
            parts = [f"{name} {degree}" for name, degree in zip(names, chosen, strict=True)]
            layouts.append(", ".join([*parts, f"dp_shard {world // math.prod(chosen)}"]))
        return layouts


_REST = ("dp_shard", -1)


def _products(world: int, divisors: list[int], wanted: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield tuples of degrees whose product divides `world`, each degree at most twice what is wanted."""
    if not wanted:
        yield ()
        return
    for first in divisors:
        if first <= 2 * wanted[0] and world % first == 0:
            rest = world // first
            for others in _products(rest, [d for d in divisors if rest % d == 0], wanted[1:]):
                yield (first, *others)


def _distance(wanted: dict[str, int], chosen: dict[str, int]) -> tuple[int, float]:
    ratios = [abs(math.log2(chosen[name] / wanted[name])) for name in chosen]
    return sum(ratio > 0 for ratio in ratios), sum(ratios)


class DataAxis(NamedTuple):
    """Where this rank stands among those that read different rows of the batch.

    Attributes:
        rank: Which part of the batch it reads.
        world: Of how many.
        leads: Whether it is the first of the ranks that read this part, as the one that counts what is in it.
    """

    rank: int
    world: int
    leads: bool


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """Lay all ranks of the default process group out as a mesh with the dimensions `MESH_DIMS`.

    Tensor-parallel peers are neighbours, so that they share a host wherever the degree allows it; pipeline stages,
    which exchange the least, are farthest apart.

    Args:
        degrees: The layout; -1 is filled in from the world size.
        device_type: `cpu` or `cuda`.

    Returns:
        The mesh. Dimensions of size 1 are there too.

    Raises:
        LayoutError: If the degrees do not multiply to the world size, or differ between ranks.
    """
    check_agreement({"the layout": degrees, "the type of device": device_type})
    full = degrees.resolve(dist.get_world_size())
    return init_device_mesh(device_type, tuple(size for _, size in full._items()), mesh_dim_names=MESH_DIMS)


def fsdp_mesh(mesh: DeviceMesh, *, experts: bool = False) -> DeviceMesh:
    """Return the mesh that FSDP2 shards over: `dp_shard`, `cp` and `ep` in one dim, `dp_replicate` before it if used.

    Args:
        mesh: From `build_mesh`.
        experts: For experts, which `ep` has spread already: without `ep`.
    """
    dims = ("dp_shard", "cp") if experts else ("dp_shard", "cp", "ep")
    shard = mesh[dims]._flatten("expert_fsdp" if experts else "fsdp")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shard]) if mesh["dp_replicate"].size() > 1 else shard


def degrees_of(mesh: DeviceMesh) -> Degrees:
    """Return the degrees of a mesh from `build_mesh`."""
    return Degrees(**{name: mesh[name].size() for name in MESH_DIMS})


def data_axis(mesh: DeviceMesh) -> DataAxis:
    """Return this rank's place on the data axis of `mesh`: `rank` of `world` readers; others share a place."""
    rank, world = 0, 1
    for name in ("dp_replicate", "dp_shard", "ep"):
        rank = rank * mesh[name].size() + mesh[name].get_local_rank()
        world *= mesh[name].size()
    return DataAxis(rank, world, all(mesh[name].get_local_rank() == 0 for name in ("pp", "cp", "tp")))
