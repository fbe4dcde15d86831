"""Modules whose code computes with local shards of their weights, as regular tensors, while the weights stay DTensors.

Used by `tensor.moe` and `expert.experts`, for modules whose code indexes or reshapes its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

Use = Literal["own", "factor", "term"]
"""How a rank uses its local part of a parameter.

`own`: the local gradient is complete, or that of the local shard. The other two are for a parameter that every rank has
in full but uses for its part of a sum over ranks, so that each rank has a part of the gradient: `factor` if it
multiplies that part, `term` if it is added to it, in which case each rank adds its share.
"""

_SPLITTING = frozenset({"ep", "tp"})  # the mesh dims of parameters while module code runs


def read_locally(module: nn.Module, uses: Mapping[str, Use]) -> None:
    """Let a module's own code read local shards under the names of its parameters.

    Optimizers, state dicts and FSDP, which list parameters, still get the DTensors. The module becomes an instance of a
    new subclass of its class, named `Local<class>`: `repr` and `type(module)` change, `isinstance` does not, and the
    module can no longer be pickled. While FSDP keeps a parameter sharded there is no local part to read.

    Args:
        module: The module, changed in place.
        uses: Names of its direct parameters, which are DTensors when its code runs, and how the code uses them.
    """
    if not uses:
        return
    kind = type(module)
    readers = {name: property(_reader(name, use)) for name, use in uses.items()}
    module.__class__ = type(f"Local{kind.__name__}", (kind,), dict(readers))


def _reader(name: str, use: Use):  # type: ignore[no-untyped-def]
    def read(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        assert isinstance(parameter, DTensor)
        if not _SPLITTING.issuperset(parameter.device_mesh.mesh_dim_names or ()):
            return parameter  # read by FSDP itself, which gets attributes in the same way
        if use == "own":
            return parameter.to_local()
        placements, mesh = parameter.placements, parameter.device_mesh
        parts = [Partial() if placement.is_replicate() else placement for placement in placements]
        local = parameter.to_local(grad_placements=parts)
        if use == "factor":
            return local
        # A list: torch.compile does not support a generator here.
        return local / math.prod([mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate()])

    return read
