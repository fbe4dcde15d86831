"""The meshes of cases: one of each layout in a process."""

import functools

from torch.distributed.device_mesh import DeviceMesh

from titan_parallel import Degrees, build_mesh


@functools.cache
def cpu_mesh(degrees: Degrees) -> DeviceMesh:
    """Build the mesh of a layout, or return the one that an earlier case on these ranks has built.

    All ranks must ask alike. The process groups of a mesh stay until the processes end, with threads that wake 100
    times a second: those of one mesh per case slow all later cases down.
    """
    return build_mesh(degrees, "cpu")
