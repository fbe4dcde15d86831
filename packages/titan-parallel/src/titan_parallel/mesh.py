"""The device mesh: from degrees of parallelism to named dimensions, and this rank's place on the data axis.

Called by users (`build_mesh`, `data_axis`) and by `parallelize`. The mesh is an argument everywhere; there is no global
one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_parallel._torch_compat import concatenate_meshes, flatten_mesh
from titan_parallel.agreement import check_agreement
from titan_parallel.degrees import MESH_DIMS, Degrees


class DataAxis(NamedTuple):
    """The place of this rank on the data axis: which part of the batch it reads.

    Attributes:
        dp_rank: Index of the part that this rank reads.
        dp_world_size: Number of parts.
        is_dp_leader: Whether this is the first of the ranks that read the same part (those of one pp, cp and tp
            group): the one that counts what is in it.
    """

    dp_rank: int
    dp_world_size: int
    is_dp_leader: bool


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """Build the device mesh of all ranks of the default process group, with the dimensions `MESH_DIMS`.

    Tensor-parallel ranks are adjacent, so that they share a host where the degree allows it; pipeline stages, which
    communicate least, are farthest apart.

    Args:
        degrees: The layout; a `dp_shard` of -1 is filled in from the world size.
        device_type: `cpu` or `cuda`.

    Returns:
        The mesh. Dimensions of size 1 are present too.

    Raises:
        LayoutError: If the degrees do not multiply to the world size, or differ between ranks.

    Example:
        >>> mesh = build_mesh(Degrees(dp_shard=-1), "cpu")  # the process group is initialized, here with one rank
        >>> mesh.mesh_dim_names
        ('pp', 'dp_replicate', 'dp_shard', 'cp', 'ep', 'tp')
        >>> data_axis(mesh)
        DataAxis(dp_rank=0, dp_world_size=1, is_dp_leader=True)
    """
    check_agreement({"the layout": degrees, "the device type": device_type})
    full = degrees.resolve(dist.get_world_size())
    return init_device_mesh(device_type, tuple(size for _, size in full.items()), mesh_dim_names=MESH_DIMS)


def fsdp_mesh(mesh: DeviceMesh, *, experts: bool = False) -> DeviceMesh:
    """Return the mesh that FSDP2 shards over: `dp_shard`, `cp` and `ep` as one dim, after `dp_replicate` if used.

    Args:
        mesh: From `build_mesh`.
        experts: Whether it is for experts, which `ep` has distributed already: without `ep`.
    """
    dims = ("dp_shard", "cp") if experts else ("dp_shard", "cp", "ep")
    shard = flatten_mesh(mesh[dims], "expert_fsdp" if experts else "fsdp")
    return concatenate_meshes([mesh["dp_replicate"], shard]) if mesh["dp_replicate"].size() > 1 else shard


def degrees_of(mesh: DeviceMesh) -> Degrees:
    """Return the degrees of a mesh from `build_mesh`."""
    return Degrees(**{name: mesh[name].size() for name in MESH_DIMS})


def data_axis(mesh: DeviceMesh) -> DataAxis:
    """Return this rank's place on the data axis of `mesh`. Ranks of one pp, cp and tp group have the same place."""
    rank, size = 0, 1
    for name in ("dp_replicate", "dp_shard", "ep"):
        rank = rank * mesh[name].size() + mesh[name].get_local_rank()
        size *= mesh[name].size()
    return DataAxis(rank, size, all(mesh[name].get_local_rank() == 0 for name in ("pp", "cp", "tp")))
